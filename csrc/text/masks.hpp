// 64 characters at a time as bit masks, one for each class: bit i stands for character i.
#pragma once

#include <cstdint>

#include "unicode.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace mainspring {

constexpr int BLOCK = 64;

struct Masks {
    uint64_t space = 0, newline = 0, letter = 0, digit = 0, control = 0, carriage = 0, page = 0, colon = 0, w = 0,
             hash = 0, dot = 0, ellipsis = 0, replacement = 0, surrogate = 0, suspect = 0;
};

inline int lowest(uint64_t bits) { return __builtin_ctzll(bits); }
inline int highest(uint64_t bits) { return 63 - __builtin_clzll(bits); }
inline int count(uint64_t bits) { return __builtin_popcountll(bits); }
// Bits first to last - 1.
inline uint64_t range_mask(int first, int last) {
    const uint64_t below = last >= 64 ? ~uint64_t{0} : (uint64_t{1} << last) - 1;
    return below & ~((uint64_t{1} << first) - 1);
}

template <class Char>
void classify(const Char* data, int size, const uint16_t* properties, Masks& m) {
    for (int i = 0; i < size; ++i) {
        const uint32_t c = data[i];
        const uint16_t p = properties[c];
        const uint64_t bit = uint64_t{1} << i;
        m.space |= p & SPACE ? bit : 0;
        m.letter |= p & LETTER ? bit : 0;
        m.digit |= p & DIGIT ? bit : 0;
        m.control |= p & CONTROL ? bit : 0;
        m.suspect |= p & SUSPECT ? bit : 0;
        m.newline |= c == '\n' ? bit : 0;
        m.carriage |= c == '\r' ? bit : 0;
        m.page |= c == 0x0B || c == 0x0C ? bit : 0;
        m.colon |= c == ':' ? bit : 0;
        m.w |= c == 'w' ? bit : 0;
        m.hash |= c == '#' ? bit : 0;
        m.dot |= c == '.' ? bit : 0;
        m.ellipsis |= c == 0x2026 ? bit : 0;
        m.replacement |= c == REPLACEMENT ? bit : 0;
        m.surrogate |= c >= 0xD800 && c < 0xE000 ? bit : 0;
    }
}

#if defined(__SSE2__)
// ASCII only: the comparisons are signed. SSE2 is part of every x86-64, so one version is enough; others use the table.
inline void classify_ascii(const uint8_t* data, Masks& m) {
    const auto set = [](int value) { return _mm_set1_epi8(static_cast<char>(value)); };
    const auto between = [&](__m128i v, int low, int high) {
        return _mm_and_si128(_mm_cmpgt_epi8(v, set(low - 1)), _mm_cmplt_epi8(v, set(high + 1)));
    };
    for (int part = 0; part < 4; ++part) {
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + 16 * part));
        const auto put = [&](uint64_t& mask, __m128i hit) {
            mask |= static_cast<uint64_t>(static_cast<uint32_t>(_mm_movemask_epi8(hit))) << (16 * part);
        };
        const auto is = [&](int value) { return _mm_cmpeq_epi8(v, set(value)); };
        const __m128i blank = _mm_or_si128(between(v, 9, 13), between(v, 0x1C, 0x1F));
        put(m.space, _mm_or_si128(blank, is(' ')));
        put(m.letter, between(_mm_or_si128(v, set(0x20)), 'a', 'z'));
        put(m.digit, between(v, '0', '9'));
        put(m.newline, is('\n'));
        put(m.colon, is(':'));
        put(m.w, is('w'));
        put(m.hash, is('#'));
        put(m.dot, is('.'));
        // These are rare: looked for one by one only where there is a control character other than tab and newline.
        const __m128i low = _mm_andnot_si128(between(v, 9, 10), _mm_cmplt_epi8(v, set(0x20)));
        const __m128i odd = _mm_or_si128(low, is(0x7F));
        if (_mm_movemask_epi8(odd) != 0) {
            put(m.carriage, is('\r'));
            put(m.page, between(v, 0x0B, 0x0C));
            put(m.control, _mm_andnot_si128(between(v, 0x0B, 0x0D), odd));
        }
    }
}
#endif

// The `size` (1 to 64) characters from `data`; bits beyond are 0.
template <class Char>
Masks masks_of(const Char* data, int64_t size, bool ascii, const uint16_t* properties) {
    Masks m;
#if defined(__SSE2__)
    if constexpr (sizeof(Char) == 1) {
        if (ascii && size >= BLOCK) {
            classify_ascii(data, m);
            return m;
        }
    }
#endif
    (void)ascii;
    classify(data, static_cast<int>(size < BLOCK ? size : BLOCK), properties, m);
    return m;
}

}  // namespace mainspring
