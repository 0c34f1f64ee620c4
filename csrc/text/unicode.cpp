#include "unicode.hpp"

#include <cstddef>
#include <vector>

namespace mainspring {
namespace {

struct Run {
    uint32_t first;
    uint16_t properties;
};
constexpr Run RUNS[] = {
#include "unicode_table.inc"
};
constexpr uint32_t CODE_POINTS = 0x110000;

// Flat: 2 MB, of which a text touches the few pages of its scripts, and one load a character.
std::vector<uint16_t> expand() {
    std::vector<uint16_t> table(CODE_POINTS);
    const std::size_t runs = sizeof(RUNS) / sizeof(RUNS[0]);
    for (std::size_t i = 0; i < runs; ++i) {
        const uint32_t end = i + 1 < runs ? RUNS[i + 1].first : CODE_POINTS;
        for (uint32_t point = RUNS[i].first; point < end; ++point) table[point] = RUNS[i].properties;
    }
    return table;
}

}  // namespace

const uint16_t* unicode_properties() {
    static const std::vector<uint16_t> table = expand();
    return table.data();
}

}  // namespace mainspring
