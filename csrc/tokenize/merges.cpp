#include "merges.hpp"

#include <algorithm>
#include <functional>
#include <stdexcept>

namespace mainspring {
namespace {

// Up to here looking through all ranks for the lowest beats a heap (measured on Python sources and on Chinese).
constexpr uint32_t kShort = 64;
constexpr uint32_t kNone = ~uint32_t{0};

}  // namespace

Merges::Merges(const int32_t* byte_ids, const std::vector<Merge>& merges) {
    std::copy(byte_ids, byte_ids + 256, byte_ids_);
    int bits = 4;
    while ((uint64_t{1} << bits) < 2 * merges.size() + 2) ++bits;
    table_.assign(uint64_t{1} << bits, Entry{kNoPair, kNoRank, -1});
    mask_ = (uint64_t{1} << bits) - 1;
    shift_ = 64 - bits;
    for (uint64_t rank = 0; rank < merges.size(); ++rank) {
        const Merge& merge = merges[rank];
        if (merge.left < 0 || merge.right < 0 || merge.result < 0) throw std::invalid_argument("negative id in a merge");
        Entry& entry = const_cast<Entry&>(find(merge.left, merge.right));
        entry = {uint64_t(uint32_t(merge.left)) << 32 | uint32_t(merge.right), uint32_t(rank), merge.result};
    }
}

uint32_t Merges::encode(const uint8_t* word, uint32_t size, int32_t* out, MergeScratch& scratch) const {
    if (scratch.ids.size() < size) {
        scratch.ids.resize(size), scratch.result.resize(size), scratch.rank.resize(size);
        scratch.before.resize(size), scratch.after.resize(size);
    }
    uint32_t count = 0;
    for (uint32_t i = 0; i < size; ++i)
        if (byte_ids_[word[i]] >= 0) scratch.ids[count++] = byte_ids_[word[i]];
    if (!count) return 0;
    for (uint32_t i = 0; i + 1 < count; ++i) {
        const Entry& entry = find(scratch.ids[i], scratch.ids[i + 1]);
        scratch.rank[i] = entry.rank, scratch.result[i] = entry.result;
    }
    scratch.rank[count - 1] = kNoRank;
    return count <= kShort ? encode_short(count, out, scratch) : encode_long(count, out, scratch);
}

uint32_t Merges::encode_short(uint32_t count, int32_t* out, MergeScratch& scratch) const {
    int32_t *ids = scratch.ids.data(), *result = scratch.result.data();
    uint32_t* rank = scratch.rank.data();
    const auto look_up = [&](uint32_t i) {
        const Entry& entry = find(ids[i], ids[i + 1]);
        rank[i] = entry.rank, result[i] = entry.result;
    };
    for (;;) {
        const uint32_t at = static_cast<uint32_t>(std::min_element(rank, rank + count) - rank);
        if (rank[at] == kNoRank) break;
        ids[at] = result[at];
        // What stood at at + 1 goes; the last rank stays kNoRank.
        std::copy(ids + at + 2, ids + count, ids + at + 1);
        std::copy(rank + at + 1, rank + count, rank + at);
        std::copy(result + at + 1, result + count, result + at);
        --count;
        if (at + 1 < count) look_up(at);
        if (at > 0) look_up(at - 1);
    }
    std::copy(ids, ids + count, out);
    return count;
}

uint32_t Merges::encode_long(uint32_t count, int32_t* out, MergeScratch& scratch) const {
    int32_t *ids = scratch.ids.data(), *result = scratch.result.data();
    uint32_t *rank = scratch.rank.data(), *before = scratch.before.data(), *after = scratch.after.data();
    std::vector<uint64_t>& heap = scratch.heap;  // rank << 32 | place, the lowest on top
    heap.clear();
    for (uint32_t i = 0; i < count; ++i) {
        before[i] = i ? i - 1 : kNone;
        after[i] = i + 1 < count ? i + 1 : kNone;
        if (rank[i] != kNoRank) heap.push_back(uint64_t{rank[i]} << 32 | i);
    }
    const auto lowest = std::greater<uint64_t>();
    std::make_heap(heap.begin(), heap.end(), lowest);
    const auto look_up = [&](uint32_t i) {
        rank[i] = kNoRank;
        if (after[i] == kNone) return;
        const Entry& entry = find(ids[i], ids[after[i]]);
        rank[i] = entry.rank, result[i] = entry.result;
        if (entry.rank == kNoRank) return;
        heap.push_back(uint64_t{entry.rank} << 32 | i);
        std::push_heap(heap.begin(), heap.end(), lowest);
    };
    while (!heap.empty()) {
        std::pop_heap(heap.begin(), heap.end(), lowest);
        const uint32_t at = static_cast<uint32_t>(heap.back());
        const uint32_t wanted = static_cast<uint32_t>(heap.back() >> 32);
        heap.pop_back();
        if (rank[at] != wanted) continue;  // one of the two has been merged since
        const uint32_t gone = after[at];
        ids[at] = result[at];
        rank[gone] = kNoRank;
        after[at] = after[gone];
        if (after[at] != kNone) before[after[at]] = at;
        look_up(at);
        if (before[at] != kNone) look_up(before[at]);
    }
    uint32_t kept = 0;
    for (uint32_t i = 0; i != kNone; i = after[i]) out[kept++] = ids[i];
    return kept;
}

}  // namespace mainspring
