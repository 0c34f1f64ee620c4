// The patterns by which byte-level BPE tokenizers cut text into words, written out by hand.
//
// Each struct has `next(p, end)`: the end of the word that begins at p < end, in valid UTF-8; what a pattern looks ahead
// to ends at `end`. The regular expressions stand above their structs; every text is covered by each of them.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "unicode.hpp"

namespace mainspring {

using Bytes = const uint8_t*;

struct Seen {
    uint8_t bits;
    uint8_t length;
};

// kLate: late digits are numbers.
template <bool kLate = false>
inline Seen look(Bytes p) {
    if (*p < 0x80) return {kClass[*p], 1};
    const Character at = decode(p);
    if (kLate && is_late_digit(at.point)) return {kNumber, static_cast<uint8_t>(at.length)};
    return {class_of(at.point), static_cast<uint8_t>(at.length)};
}

inline bool is_newline(uint8_t c) { return c == '\n' || c == '\r'; }

// The end of the run of characters with any of these bits.
template <bool kLate = false>
inline Bytes run_of(uint8_t bits, Bytes p, Bytes end) {
    while (p < end) {
        const Seen at = look<kLate>(p);
        if (!(at.bits & bits)) break;
        p += at.length;
    }
    return p;
}

// run_of(kLetter), 16 bytes at a time as long as they are ASCII: words are short, so mostly one step without a branch.
inline Bytes letters(Bytes p, Bytes end) {
#if defined(__SSE2__)
    while (end - p >= 16) {
        const __m128i text = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        // Lower case, moved so that the letters are the 26 smallest signed bytes.
        const __m128i moved = _mm_add_epi8(_mm_or_si128(text, _mm_set1_epi8(0x20)), _mm_set1_epi8(128 - 'a'));
        const unsigned letter = _mm_movemask_epi8(_mm_cmplt_epi8(moved, _mm_set1_epi8(-128 + 26)));
        const int run = __builtin_ctz(~letter);
        p += run;
        if (run == 16) continue;
        if (*p < 0x80) return p;
        break;
    }
#endif
    return run_of(kLetter, p, end);
}

inline Bytes newlines(Bytes p, Bytes end) {
    while (p < end && is_newline(*p)) ++p;
    return p;
}

// Neither letter, number nor white space.
inline bool is_other(uint8_t bits) { return !(bits & (kLetter | kNumber | kSpace)); }

template <bool kLate = false>
inline Bytes others(Bytes p, Bytes end) {
    while (p < end) {
        const Seen at = look<kLate>(p);
        if (!is_other(at.bits)) break;
        p += at.length;
    }
    return p;
}

// At most three numbers, at least the one at p (of this length).
inline Bytes three_numbers(Bytes p, uint32_t length, Bytes end) {
    p += length;
    for (int i = 0; i < 2 && p < end; ++i) {
        const Seen at = look(p);
        if (!(at.bits & kNumber)) break;
        p += at.length;
    }
    return p;
}

// 's 't 're 've 'm 'll 'd behind the apostrophe at p: the end, or p if there is none. Where case does not matter, U+017F
// is an s as well.
template <bool kAnyCase>
inline Bytes contraction(Bytes p, Bytes end) {
    const auto left = end - p;
    if (left < 2) return p;
    const uint8_t lower = kAnyCase ? 0x20 : 0;
    const uint8_t a = p[1] | lower, b = left > 2 ? p[2] | lower : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return p + 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return p + 3;
    if (kAnyCase && left > 2 && p[1] == 0xC5 && p[2] == 0xBF) return p + 3;
    return p;
}

// \s*[\r\n]+|\s+(?!\S)|\s+ (kNewlines), or \s+(?!\S)|\s+, at white space of this length.
template <bool kNewlines>
inline Bytes blanks(Bytes p, uint32_t length, Bytes end) {
    Bytes q = p, last = p, newline = nullptr;  // last: the last character of the run
    for (;;) {
        last = q;
        if (kNewlines && is_newline(*q)) newline = q + 1;
        q += length;
        if (q == end) break;
        const Seen at = look(q);
        if (!(at.bits & kSpace)) break;
        length = at.length;
    }
    if (newline) return newline;
    return q == end || last == p ? q : last;  // the last blank belongs to the word behind it
}

// '(?i:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,kDigits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
template <int kDigits>
struct Llama3 {
    static inline Bytes next(Bytes p, Bytes end) {
        const Seen first = look(p);
        if (first.bits & kLetter) return letters(p + first.length, end);
        if (first.bits & kNumber) return kDigits == 1 ? p + first.length : three_numbers(p, first.length, end);
        if (*p == '\'') {
            const Bytes q = contraction<true>(p, end);
            if (q != p) return q;
        }
        const Bytes q = p + first.length;
        if (q < end && !is_newline(*p)) {
            const Seen second = look(q);
            if (second.bits & kLetter) return letters(q + second.length, end);
            if (*p == ' ' && is_other(second.bits)) return newlines(others(q + second.length, end), end);
        }
        if (first.bits & kSpace) return blanks<true>(p, first.length, end);
        return newlines(others(q, end), end);
    }
};

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
template <bool kLate = false>
struct Gpt2 {
    static inline Bytes next(Bytes p, Bytes end) {
        const Bytes start = p;
        if (*p == '\'') {
            const Bytes q = contraction<false>(p, end);
            if (q != p) return q;
        }
        Seen first = look<kLate>(p);
        const bool blank = *p == ' ' && end - p > 1;
        if (blank) first = look<kLate>(++p);
        if (first.bits & kLetter) return letters(p + first.length, end);
        if (first.bits & kNumber) return run_of<kLate>(kNumber, p + first.length, end);
        if (!(first.bits & kSpace)) return others<kLate>(p + first.length, end);
        return blanks<false>(start, blank ? 1 : first.length, end);
    }
};

// [^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+C?
// |[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*C?
// |\p{N}{1,kDigits}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+         C the contractions, if kContractions
template <int kDigits, bool kContractions>
struct CaseSplit {
    static constexpr uint8_t kHigh = kUpper | kCaseless | kMark, kLow = kLower | kCaseless | kMark;
    static constexpr uint8_t kBoth = kHigh & kLow;

    // [kHigh]*[kLow]+ from p; nullptr if there is none.
    static inline Bytes ends_low(Bytes p, Bytes end) {
        Bytes both = nullptr;  // behind the last character of the run that is of both classes
        while (p < end) {
            const Seen at = look(p);
            if (!(at.bits & kHigh)) break;
            p += at.length;
            if (at.bits & kBoth) both = p;
        }
        const Bytes low = run_of(kLow, p, end);
        return low != p ? low : both;  // giving back of the first run until one is left for the second
    }

    // [kHigh]+[kLow]* from p; nullptr if there is none.
    static inline Bytes starts_high(Bytes p, Bytes end) {
        const Bytes high = run_of(kHigh, p, end);
        return high == p ? nullptr : run_of(kLow, high, end);
    }

    static inline Bytes with_contraction(Bytes p, Bytes end) {
        return kContractions && p < end && *p == '\'' ? contraction<true>(p, end) : p;
    }

    static inline Bytes next(Bytes p, Bytes end) {
        const Seen first = look(p);
        const Bytes q = p + first.length;
        if (first.bits & kNumber) return kDigits == 1 ? q : three_numbers(p, first.length, end);
        const bool letter = first.bits & kLetter, prefix = !letter && !is_newline(*p);
        const bool words = letter || (first.bits & kMark) || (q < end && (look(q).bits & (kLetter | kMark)));
        if (words) {
            Bytes found = prefix ? ends_low(q, end) : nullptr;
            if (!found) found = ends_low(p, end);
            if (!found && prefix) found = starts_high(q, end);
            if (!found) found = starts_high(p, end);
            if (found) return with_contraction(found, end);
        }
        if (*p == ' ' && q < end) {
            const Seen second = look(q);
            if (is_other(second.bits)) return slashes(others(q + second.length, end), end);
        }
        if (first.bits & kSpace) return blanks<true>(p, first.length, end);
        return slashes(others(q, end), end);
    }

    static inline Bytes slashes(Bytes p, Bytes end) {
        while (p < end && (is_newline(*p) || *p == '/')) ++p;
        return p;
    }
};

// Every number by itself (a split before the pattern, so that nothing looks beyond it), then GPT-2's.
struct DigitsGpt2 {
    static inline Bytes next(Bytes p, Bytes end) {
        const Seen first = look<true>(p);
        if (first.bits & kNumber) return p + first.length;
        const Bytes q = Gpt2<true>::next(p, end);
        // A number can only be met by the look-ahead of a run of blanks and behind a single blank.
        if (!(first.bits & kSpace)) return q;
        const Bytes behind = run_of(kSpace, p, end);
        return behind < end && (look<true>(behind).bits & kNumber) ? behind : q;
    }
};

}  // namespace mainspring
