// Sections of sorted records: what external sorting leaves on disk, read back a range of keys at a time.
//
// A section: blocks of 128 records (key, document), each followed by its checksum; then the first key of every block,
// and their checksum. So a range of keys costs its own blocks and the list of first keys, whatever the file's size.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "file.hpp"
#include "hash.hpp"

namespace mainspring {

template <int W>
struct Record {
    std::array<uint64_t, W> key;
    uint32_t unit, document;
    bool operator<(const Record& other) const {
        if (key[0] != other.key[0]) return key[0] < other.key[0];
        if (W == 2 && key[W - 1] != other.key[W - 1]) return key[W - 1] < other.key[W - 1];
        return unit != other.unit ? unit < other.unit : document < other.document;
    }
    // Not by std::array, which calls memcmp.
    bool same_key(const Record& other) const { return key[0] == other.key[0] && key[W - 1] == other.key[W - 1]; }
};

// Both ends belong to it: the last one ends at the largest key.
struct KeyRange {
    uint64_t first, last;
};

// Range `part` of `parts` equal ones of the 64-bit numbers. std::invalid_argument unless part < parts.
inline KeyRange key_range(uint64_t part, uint64_t parts) {
    if (parts == 0 || part >= parts) throw std::invalid_argument("part must be below parts");
    if (parts == 1) return {0, ~uint64_t{0}};
    // 2^64 = parts * width + rest, in 64-bit numbers; the first `rest` ranges are one longer.
    const uint64_t rest = (~uint64_t{0} % parts + 1) % parts;
    const uint64_t width = ~uint64_t{0} / parts + (rest == 0 ? 1 : 0);
    const uint64_t first = part * width + std::min(part, rest);
    return {first, first + width - (part < rest ? 0 : 1)};
}

constexpr uint64_t BLOCK_RECORDS = 128;

template <int W>
constexpr uint64_t record_bytes() {
    return 8 * W + 4;
}

template <int W>
uint64_t section_bytes(uint64_t records) {
    const uint64_t blocks = (records + BLOCK_RECORDS - 1) / BLOCK_RECORDS;
    return records * record_bytes<W>() + blocks * 16 + 8;
}

// Writes a section of section_bytes<W>(sorted.size()) bytes; `seed` tells it from the file's other sections. Units are
// not written: they are a file's.
template <int W>
void put_section(char* out, const std::vector<Record<W>>& sorted, uint64_t seed) {
    std::vector<uint64_t> firsts;
    firsts.reserve(sorted.size() / BLOCK_RECORDS + 2);
    for (uint64_t first = 0; first < sorted.size(); first += BLOCK_RECORDS) {
        const uint64_t count = std::min<uint64_t>(BLOCK_RECORDS, sorted.size() - first);
        const uint64_t size = count * record_bytes<W>();
        for (uint64_t i = 0; i < count; ++i) {
            std::memcpy(out + i * record_bytes<W>(), sorted[first + i].key.data(), 8 * W);
            std::memcpy(out + i * record_bytes<W>() + 8 * W, &sorted[first + i].document, 4);
        }
        const uint64_t checksum = hash_bytes(out, size, mix(firsts.size(), seed));
        std::memcpy(out + size, &checksum, 8);
        out += size + 8;
        firsts.push_back(sorted[first].key[0]);
    }
    firsts.push_back(hash_bytes(firsts.data(), firsts.size() * 8, ~seed));
    std::memcpy(out, firsts.data(), firsts.size() * 8);
}

// visit(record) for the section's records with range.first <= key[0] <= range.last, in order, `unit` filled in.
template <int W, class Visit>
void read_section(InputFile& file, uint64_t at, uint64_t seed, KeyRange range, uint32_t unit, const Visit& visit) {
    const uint64_t records = file.header().records, blocks = (records + BLOCK_RECORDS - 1) / BLOCK_RECORDS;
    const uint64_t stride = BLOCK_RECORDS * record_bytes<W>() + 8;
    std::vector<uint64_t> firsts(blocks + 1);
    file.read(at + records * record_bytes<W>() + blocks * 8, blocks * 8 + 8, firsts.data());
    if (firsts[blocks] != hash_bytes(firsts.data(), blocks * 8, ~seed)) file.damaged("has a damaged index");
    const auto begin = firsts.begin(), end = firsts.end() - 1;
    // Keys equal to a block's first may end the block before it.
    const uint64_t from = std::max<int64_t>(0, std::lower_bound(begin, end, range.first) - begin - 1);
    const uint64_t to = std::upper_bound(begin, end, range.last) - begin;
    constexpr uint64_t AT_ONCE = 512;  // 1.3 MB
    std::vector<char> buffer(std::min(AT_ONCE, to > from ? to - from : 0) * stride);
    Record<W> record{{}, unit, 0}, before{{}, 0, 0};
    bool any = false;
    for (uint64_t first = from; first < to; first += AT_ONCE) {
        const uint64_t last = std::min(to, first + AT_ONCE);
        const uint64_t stop = last == blocks ? records * record_bytes<W>() + blocks * 8 : last * stride;
        file.read(at + first * stride, stop - first * stride, buffer.data());
        for (uint64_t b = first; b < last; ++b) {
            const char* block = buffer.data() + (b - first) * stride;
            const uint64_t count = std::min(BLOCK_RECORDS, records - b * BLOCK_RECORDS);
            if (load64(block + count * record_bytes<W>()) !=
                hash_bytes(block, count * record_bytes<W>(), mix(b, seed)))
                file.damaged("is damaged in block " + std::to_string(b));
            for (uint64_t i = 0; i < count; ++i) {
                std::memcpy(record.key.data(), block + i * record_bytes<W>(), 8 * W);
                std::memcpy(&record.document, block + i * record_bytes<W>() + 8 * W, 4);
                before.unit = unit;
                if (any && !(before < record)) file.damaged("is not sorted in block " + std::to_string(b));
                before = record;
                any = true;
                if (record.key[0] >= range.first && record.key[0] <= range.last) visit(record);
            }
        }
    }
}

// Sorts records whose keys are spread evenly over `range` (hashes are): into buckets of about 16, each sorted. Equal
// keys, however many, cost what std::sort costs. Needs the memory of the records once more.
template <int W>
void sort_records(std::vector<Record<W>>& records, KeyRange range) {
    int bits = 0;
    while (bits < 28 && (records.size() >> (bits + 4)) > 0) ++bits;
    int spread = 64;  // bits in which keys of the range differ
    while (spread > 0 && ((range.last - range.first) >> (spread - 1)) == 0) --spread;
    if (bits == 0 || spread == 0) return std::sort(records.begin(), records.end());
    const int shift = std::max(0, spread - bits);
    const uint64_t buckets = ((range.last - range.first) >> shift) + 1;
    std::vector<uint64_t> ends(buckets + 1);
    for (const Record<W>& record : records) ++ends[((record.key[0] - range.first) >> shift) + 1];
    for (uint64_t b = 1; b <= buckets; ++b) ends[b] += ends[b - 1];
    std::vector<Record<W>> sorted(records.size());
    for (const Record<W>& record : records) sorted[ends[(record.key[0] - range.first) >> shift]++] = record;
    uint64_t begin = 0;
    for (uint64_t b = 0; b < buckets; ++b) {
        std::sort(sorted.begin() + begin, sorted.begin() + ends[b]);
        begin = ends[b];
    }
    records.swap(sorted);
}

}  // namespace mainspring
