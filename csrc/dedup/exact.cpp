#include "exact.hpp"

#include <algorithm>
#include <stdexcept>
#include <tuple>

#include "runs.hpp"

namespace mainspring {

namespace {

constexpr uint64_t SEED = 2;

}  // namespace

std::string encode_run(const uint64_t* digests, uint64_t count) {
    if (count > UINT32_MAX) throw std::length_error("a unit has less than 2^32 documents");
    std::vector<Record<2>> records(count);
    for (uint64_t i = 0; i < count; ++i)
        records[i] = {{digests[2 * i], digests[2 * i + 1]}, 0, static_cast<uint32_t>(i)};
    sort_records(records, {0, ~uint64_t{0}});
    std::string out;
    const Header header{2, 1, count, 0, 0, 0};
    out.reserve(file_bytes(header));
    append_header(out, header);
    append_section(out, records, SEED);
    return out;
}

std::vector<Duplicate> exact_duplicates(const std::vector<std::string>& paths, uint64_t part, uint64_t parts) {
    const KeyRange range = key_range(part, parts);
    std::vector<Record<2>> records;
    for (uint64_t unit = 0; unit < paths.size(); ++unit) {
        InputFile file(paths[unit]);
        if (file.header().key_words != 2 || file.header().sections != 1) file.damaged("is no run of digests");
        read_section<2>(file, HEADER_BYTES, SEED, range, static_cast<uint32_t>(unit),
                        [&](const Record<2>& record) { records.push_back(record); });
    }
    sort_records(records, range);
    std::vector<Duplicate> found;
    for (uint64_t first = 0, i = 1; i < records.size(); ++i) {
        if (records[i].key != records[first].key)
            first = i;
        else
            found.push_back({records[i].unit, records[i].document, records[first].unit, records[first].document});
    }
    std::sort(found.begin(), found.end(), [](const Duplicate& a, const Duplicate& b) {
        return std::tie(a.unit, a.document) < std::tie(b.unit, b.document);
    });
    return found;
}

}  // namespace mainspring
