#include "near.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <unordered_map>

#include "clones.hpp"
#include "minhash.hpp"
#include "parallel.hpp"
#include "runs.hpp"

namespace mainspring {

namespace {

constexpr uint64_t BAND_SEED = 1 << 20, ROW_SEED = 3, PAIRS_SEED = 4;
constexpr uint64_t ROWS_AT_ONCE = 65536;  // 10 MB at 128 permutations
constexpr uint64_t ANY_LEADERS = 32, LEADERS = 64;
constexpr uint64_t PAIRS_EACH = 8;  // of a document in a key of more than LEADERS: one of its likes will stay
constexpr uint64_t READ_AHEAD = 8;  // rows nobody asked for cost less than another read

uint64_t pack(uint32_t unit, uint32_t document) { return uint64_t{unit} << 32 | document; }
uint32_t high(uint64_t both) { return static_cast<uint32_t>(both >> 32); }
uint32_t low(uint64_t both) { return static_cast<uint32_t>(both); }

uint32_t row_checksum(const uint8_t* row, uint64_t size, uint64_t document) {
    return static_cast<uint32_t>(hash_bytes(row, size, mix(document, ROW_SEED)));
}

uint64_t rows_at(const Header& header) { return file_bytes(header) - header.rows * row_bytes(header); }

// A byte that all bits of a number reach: minima have few high bits.
MAINSPRING_CLONES
void put_bytes(const uint32_t* numbers, uint64_t count, uint8_t* out) {
    for (uint64_t j = 0; j < count; ++j) out[j] = static_cast<uint8_t>(numbers[j] * 0x9e3779b1 >> 24);
}

MAINSPRING_CLONES
uint32_t equal_bytes(const uint8_t* a, const uint8_t* b, uint64_t count) {
    uint32_t equal = 0;
    for (uint64_t j = 0; j < count; ++j) equal += a[j] == b[j];
    return equal;
}

// Rows of documents (packed, sorted, each once), in their order: one file after another, neighbours in one read.
class Rows {
   public:
    Rows(const std::vector<std::string>& paths, uint64_t width) : paths_(paths), width_(width) {}

    void load(std::vector<uint64_t> documents) {
        documents_ = std::move(documents);
        rows_.resize(documents_.size() * width_);
        for (uint64_t first = 0; first < documents_.size();) {
            uint64_t last = first + 1;
            while (last < documents_.size() && high(documents_[last]) == high(documents_[first])) ++last;
            load_unit(first, last);
            first = last;
        }
    }
    const uint8_t* operator[](uint64_t document) const {
        const auto at = std::lower_bound(documents_.begin(), documents_.end(), document) - documents_.begin();
        return &rows_[static_cast<uint64_t>(at) * width_];
    }

   private:
    void load_unit(uint64_t first, uint64_t last) {
        InputFile file(paths_[high(documents_[first])]);
        const uint64_t stride = row_bytes(file.header()), start = rows_at(file.header());
        for (uint64_t i = first; i < last;) {
            uint64_t end = i + 1;
            while (end < last && documents_[end] - documents_[end - 1] <= READ_AHEAD && end - i < 1024) ++end;
            const uint64_t from = low(documents_[i]), count = low(documents_[end - 1]) - from + 1;
            buffer_.resize(count * stride);
            file.read(start + from * stride, count * stride, buffer_.data());
            for (; i < end; ++i) {
                const uint8_t* row = &buffer_[(low(documents_[i]) - from) * stride];
                const uint32_t checksum = row_checksum(row, width_, low(documents_[i]));
                if (std::memcmp(row + width_, &checksum, 4) != 0)
                    file.damaged("is damaged in the signature of document " + std::to_string(low(documents_[i])));
                std::copy_n(row, width_, &rows_[i * width_]);
            }
        }
    }

    const std::vector<std::string>& paths_;
    uint64_t width_;  // without the checksum
    std::vector<uint64_t> documents_;
    std::vector<uint8_t> rows_, buffer_;
};

// The documents of one key, compared one after another: each with the leaders so far. A copy of a leader leads nobody:
// it goes where the leader stays, and where the leader goes, it goes for the same document.
class Group {
   public:
    Group(const PairOptions& options, const Header& header, uint64_t size, std::vector<Duplicate>& out)
        : options_(options), permutations_(header.permutations), width_(row_bytes(header) - 4),
          all_(size <= LEADERS), out_(out) {}

    void add(uint64_t document, const uint8_t* row) {
        bool alone = true, copy = false;
        uint64_t pairs = 0;
        for (uint64_t i = 0; i < leaders_.size() && (all_ || pairs < PAIRS_EACH); ++i) {
            const uint8_t* other = &rows_[i * width_];
            if (equal_bytes(row, other, permutations_) < options_.matches) continue;
            alone = false;
            copy |= std::memcmp(row, other, width_) == 0;
            pairs += put(document, leaders_[i], row, other);
        }
        if (copy) return;
        if (leaders_.size() < (all_ || alone ? LEADERS : ANY_LEADERS)) {
            leaders_.push_back(document);
            rows_.insert(rows_.end(), row, row + width_);
        } else if (options_.band == 0) {  // copies share all bands
            const auto [at, first] = led_.try_emplace(hash_bytes(row, width_, 0), document);
            if (!first) put(document, at->second, row, row);
        }
    }

   private:
    // Whether the pair is this band's to report.
    bool put(uint64_t document, uint64_t earlier, const uint8_t* row, const uint8_t* other) {
        if (in_earlier_band(row, other)) return false;
        out_.push_back({high(document), low(document), high(earlier), low(earlier)});
        return true;
    }

    bool in_earlier_band(const uint8_t* a, const uint8_t* b) const {
        for (uint64_t at = permutations_; at < permutations_ + 2 * options_.band; at += 2)
            if (a[at] == b[at] && a[at + 1] == b[at + 1]) return true;
        return false;
    }

    const PairOptions& options_;
    uint64_t permutations_, width_;
    bool all_;
    std::vector<Duplicate>& out_;
    std::vector<uint64_t> leaders_;
    std::vector<uint8_t> rows_;
    std::unordered_map<uint64_t, uint64_t> led_;  // of those who lead nobody the first with each row, by its hash
};

// The band's records of all units in the range, sorted; and a header, for what is the same in all files.
std::vector<Record<1>> keys_of(const std::vector<std::string>& paths, const Mask& mask, const PairOptions& options,
                               KeyRange range, Header& shape) {
    std::vector<Record<1>> records;
    for (uint64_t unit = 0; unit < paths.size(); ++unit) {
        InputFile file(paths[unit]);
        const Header& header = file.header();
        if (header.key_words != 1 || header.permutations == 0) file.damaged("is no file of signatures");
        if (header.settings != options.settings) file.damaged("was signed with other settings");
        if (options.band >= header.sections) file.damaged("has no band " + std::to_string(options.band));
        shape = header;
        const uint8_t* keep = mask(unit, header.rows);
        const uint64_t at = HEADER_BYTES + options.band * section_bytes<1>(header.records);
        read_section<1>(file, at, BAND_SEED + options.band, range, static_cast<uint32_t>(unit),
                        [&](const Record<1>& record) {
                            if (record.document >= header.rows) file.damaged("names a document that it has not");
                            if (keep == nullptr || keep[record.document]) records.push_back(record);
                        });
    }
    sort_records(records, range);
    return records;
}

// Only keys of two documents or more are of interest.
struct Span {
    uint64_t first, last;
};

std::vector<Span> groups_of(const std::vector<Record<1>>& records) {
    std::vector<Span> groups;
    for (uint64_t first = 0, last; first < records.size(); first = last) {
        last = first + 1;
        while (last < records.size() && records[last].same_key(records[first])) ++last;
        if (last - first > 1) groups.push_back({first, last});
    }
    return groups;
}

// Rows for the records in `spans`.
void load_rows(Rows& rows, const std::vector<Record<1>>& records, const std::vector<Span>& spans) {
    std::vector<uint64_t> documents;
    for (const Span& span : spans)
        for (uint64_t i = span.first; i < span.last; ++i)
            documents.push_back(pack(records[i].unit, records[i].document));
    std::sort(documents.begin(), documents.end());
    rows.load(std::move(documents));
}

}  // namespace

void encode_signatures(const uint32_t* signatures, uint64_t documents, uint64_t permutations, Split split,
                       uint64_t settings, int threads, const Allocate& allocate) {
    if (documents > UINT32_MAX) throw std::length_error("a unit has less than 2^32 documents");
    if (split.bands == 0 || split.rows == 0 || split.bands > permutations / split.rows)
        throw std::invalid_argument("bands of these rows do not fit the permutations");
    std::vector<uint32_t> signed_ones;
    for (uint64_t i = 0; i < documents; ++i) {
        const uint32_t* row = signatures + i * permutations;
        if (std::any_of(row, row + permutations, [](uint32_t number) { return number != UNSIGNED; }))
            signed_ones.push_back(static_cast<uint32_t>(i));
    }
    const Header header{1, split.bands, signed_ones.size(), documents, permutations, settings};
    char* const out = allocate(file_bytes(header));
    put_header(out, header);
    auto* const rows = reinterpret_cast<uint8_t*>(out + rows_at(header));
    const uint64_t stride = row_bytes(header), width = stride - 4;
    std::memset(rows, 0, documents * stride);
    parallel_ranges(static_cast<int64_t>(split.bands), 1, threads, [&](int64_t first, int64_t) {
        const auto band = static_cast<uint64_t>(first);
        std::vector<Record<1>> records(signed_ones.size());
        for (uint64_t i = 0; i < signed_ones.size(); ++i) {
            const uint32_t* numbers = signatures + signed_ones[i] * permutations + band * split.rows;
            const uint64_t key = hash_bytes(numbers, split.rows * 4, band);
            records[i] = {{key}, 0, signed_ones[i]};
            std::memcpy(rows + signed_ones[i] * stride + permutations + 2 * band, &key, 2);
        }
        sort_records(records, {0, ~uint64_t{0}});
        put_section(out + HEADER_BYTES + band * section_bytes<1>(records.size()), records, BAND_SEED + band);
    });
    parallel_ranges(static_cast<int64_t>(documents), 4096, threads, [&](int64_t first, int64_t last) {
        for (auto i = static_cast<uint64_t>(first); i < static_cast<uint64_t>(last); ++i) {
            put_bytes(signatures + i * permutations, permutations, rows + i * stride);
            const uint32_t checksum = row_checksum(rows + i * stride, width, i);
            std::memcpy(rows + i * stride + width, &checksum, 4);
        }
    });
}

std::vector<Duplicate> near_pairs(const std::vector<std::string>& paths, const Mask& mask, const PairOptions& options) {
    const KeyRange range = key_range(options.part, options.parts);
    Header shape{};
    const std::vector<Record<1>> records = keys_of(paths, mask, options, range, shape);
    const std::vector<Span> groups = groups_of(records);
    std::vector<Duplicate> pairs;
    Rows rows(paths, row_bytes(shape) - 4);
    for (uint64_t next = 0; next < groups.size();) {
        std::vector<Span> batch;
        for (uint64_t size = 0; next < groups.size(); ++next) {
            const uint64_t more = groups[next].last - groups[next].first;
            if (!batch.empty() && size + more > ROWS_AT_ONCE) break;
            batch.push_back(groups[next]);
            size += more;
        }
        const uint64_t size = batch[0].last - batch[0].first;
        if (size > ROWS_AT_ONCE) {  // alone in its batch, and a piece at a time
            Group group(options, shape, size, pairs);
            for (uint64_t i = batch[0].first; i < batch[0].last; i += ROWS_AT_ONCE) {
                const uint64_t end = std::min(batch[0].last, i + ROWS_AT_ONCE);
                load_rows(rows, records, {{i, end}});
                for (uint64_t k = i; k < end; ++k) {
                    const uint64_t document = pack(records[k].unit, records[k].document);
                    group.add(document, rows[document]);
                }
            }
            continue;
        }
        load_rows(rows, records, batch);
        for (const Span& span : batch) {
            Group group(options, shape, span.last - span.first, pairs);
            for (uint64_t i = span.first; i < span.last; ++i) {
                const uint64_t document = pack(records[i].unit, records[i].document);
                group.add(document, rows[document]);
            }
        }
    }
    std::sort(pairs.begin(), pairs.end(), [](const Duplicate& a, const Duplicate& b) {
        return std::tie(a.unit, a.document, a.first_unit, a.first_document) <
               std::tie(b.unit, b.document, b.first_unit, b.first_document);
    });
    return pairs;
}

void encode_pairs(const std::vector<Duplicate>& pairs, const Allocate& allocate) {
    std::vector<Record<2>> records(pairs.size());
    for (uint64_t i = 0; i < pairs.size(); ++i)
        records[i] = {{pack(pairs[i].unit, pairs[i].document), pack(pairs[i].first_unit, pairs[i].first_document)}, 0, 0};
    const Header header{2, 1, pairs.size(), 0, 0, PAIRS_SEED};
    char* out = allocate(file_bytes(header));
    put_header(out, header);
    put_section(out + HEADER_BYTES, records, PAIRS_SEED);
}

std::vector<Duplicate> near_clusters(const std::vector<std::string>& paths, uint64_t units, uint64_t pairs_at_once) {
    uint64_t total = 0;
    for (const std::string& path : paths) {
        InputFile file(path);
        if (file.header().settings != PAIRS_SEED) file.damaged("is no file of pairs");
        total += file.header().records;
    }
    const uint64_t pieces = std::max<uint64_t>(1, std::min(units, total / std::max<uint64_t>(1, pairs_at_once) + 1));
    std::vector<Duplicate> gone;
    const auto goes = [&](uint64_t document) {
        const auto at = std::lower_bound(gone.begin(), gone.end(), document, [](const Duplicate& one, uint64_t other) {
            return pack(one.unit, one.document) < other;
        });
        return at != gone.end() && pack(at->unit, at->document) == document;
    };
    std::vector<Record<2>> pairs;
    for (uint64_t piece = 0; piece < pieces; ++piece) {
        const uint64_t first = units * piece / pieces, last = units * (piece + 1) / pieces;
        pairs.clear();
        for (const std::string& path : paths) {
            InputFile file(path);
            read_section<2>(file, HEADER_BYTES, PAIRS_SEED, {first << 32, (last << 32) - 1}, 0,
                            [&](const Record<2>& record) { pairs.push_back(record); });
        }
        std::sort(pairs.begin(), pairs.end());
        for (const Record<2>& pair : pairs) {
            const auto [document, other] = pair.key;
            if (!gone.empty() && pack(gone.back().unit, gone.back().document) == document) continue;  // for an earlier one
            if (!goes(other)) gone.push_back({high(document), low(document), high(other), low(other)});
        }
    }
    return gone;
}

}  // namespace mainspring
