// The pieces of a text one after the other: what stands between blanks, or words of letters and digits.
#pragma once

#include <cstdint>

#include "hash.hpp"
#include "masks.hpp"
#include "unicode.hpp"

namespace mainspring {

// visit(first, last) for each piece that str.split() gives; it ends where visit returns false.
template <class Char, class Visit>
void each_piece(const Char* data, int64_t size, bool ascii, const Visit& visit) {
    const uint16_t* properties = unicode_properties();
    bool in_word = false;
    int64_t first = 0;
    for (int64_t base = 0; base < size; base += BLOCK) {
        const int length = static_cast<int>(size - base < BLOCK ? size - base : BLOCK);
        const uint64_t shown = ~masks_of(data + base, length, ascii, properties).space & range_mask(0, length);
        uint64_t edges = (shown ^ ((shown << 1) | (in_word ? 1 : 0))) & range_mask(0, length);
        for (; edges; edges &= edges - 1) {
            const int64_t at = base + lowest(edges);
            if (in_word && !visit(first, at)) return;
            in_word = !in_word;
            first = at;
        }
    }
    if (in_word) visit(first, size);
}

// visit(first, last) for each run of letters, digits and the marks on them; a character of an unspaced script is a run
// by itself, with its marks. It ends where visit returns false.
template <class Char, class Visit>
void each_word(const Char* data, int64_t size, const Visit& visit) {
    const uint16_t* properties = unicode_properties();
    bool single = false;
    int64_t first = -1;
    for (int64_t i = 0; i < size; ++i) {
        const uint16_t p = properties[data[i]];
        const bool inside = (p & (LETTER | DIGIT | MARK)) != 0, mark = (p & MARK) != 0;
        const bool alone = (p & SINGLE) != 0 && !mark;
        if (first >= 0 && (!inside || alone || (single && !mark))) {
            if (!visit(first, i)) return;
            first = -1;
        }
        if (inside && first < 0) {
            first = i;
            single = alone;
        }
    }
    if (first >= 0) visit(first, size);
}

// The same for a word whether its text is kept in 1, 2 or 4 bytes a character.
template <class Char>
uint64_t hash_word(const Char* data, int64_t size) {
    uint64_t hash = 0x9E3779B97F4A7C15ULL;
    for (int64_t i = 0; i < size; ++i) hash = (hash ^ data[i]) * 0x100000001B3ULL;
    return mix(hash, 0xA0761D6478BD642FULL);
}

}  // namespace mainspring
