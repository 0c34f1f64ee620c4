#include "exact.hpp"

#include <algorithm>
#include <stdexcept>
#include <tuple>

#include "runs.hpp"

namespace mainspring {

namespace {

constexpr uint64_t SEED = 2;

}  // namespace

void encode_run(const uint64_t* digests, uint64_t count, const Allocate& allocate) {
    if (count > UINT32_MAX) throw std::length_error("a unit has less than 2^32 documents");
    std::vector<Record<2>> records(count);
    for (uint64_t i = 0; i < count; ++i)
        records[i] = {{digests[2 * i], digests[2 * i + 1]}, 0, static_cast<uint32_t>(i)};
    sort_records(records, {0, ~uint64_t{0}});
    const Header header{2, 1, count, 0, 0, 0};
    char* out = allocate(file_bytes(header));
    put_header(out, header);
    put_section(out + HEADER_BYTES, records, SEED);
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
        if (!records[i].same_key(records[first]))
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
