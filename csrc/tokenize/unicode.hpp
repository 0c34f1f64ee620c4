// What a code point is: to the patterns that split text into words, and to canonical composition (NFC).
#pragma once

#include <cstdint>

namespace mainspring {

// The bits of a class. A code point is at most one of the first six.
enum : uint8_t {
    kUpper = 1,    // \p{Lu} \p{Lt}
    kLower = 2,    // \p{Ll}
    kCaseless = 4,  // \p{Lm} \p{Lo}
    kNumber = 8,   // \p{N}
    kSpace = 16,   // \s
    kMark = 32,    // \p{M}
    kSign = 64,    // \p{P} \p{S}
    kWord = 128,   // \w of the engine that looks around added tokens
    kLetter = kUpper | kLower | kCaseless,
};

struct Character {
    uint32_t point;
    uint32_t length;  // bytes
};

// The character at p, of UTF-8 that was found to be valid.
inline Character decode(const uint8_t* p) {
    const uint32_t a = p[0];
    if (a < 0x80) return {a, 1};
    if (a < 0xE0) return {(a & 0x1F) << 6 | (p[1] & 0x3Fu), 2};
    if (a < 0xF0) return {(a & 0x0F) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu), 3};
    return {(a & 0x07) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu), 4};
}

// Two stages: the block of 256 code points, and the bits in it. Block 0 is the first, so kClass[c] is that of ASCII's c.
extern const uint8_t kClassBlock[];
extern const uint8_t kClass[];

// The class bits of a code point below 0x110000.
inline uint8_t class_of(uint32_t point) { return kClass[kClassBlock[point >> 8] << 8 | (point & 255)]; }

// A number to the pre-tokenizer `Digits`, whose Unicode is newer than that of the patterns, and to nothing else.
bool is_late_digit(uint32_t point);

// Where the first byte is that is not part of valid UTF-8, -1 if all is.
int64_t invalid_utf8(const uint8_t* text, uint64_t size);

// True only if the text is in normalisation form C. False may also mean that this is not easily told.
bool surely_normal(const uint8_t* text, uint64_t size);

}  // namespace mainspring
