#include "unicode.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace mainspring {

#include "unicode_tables.inc"

namespace {

// Of an entry of kMore: the canonical combining class, and four bits.
constexpr uint16_t kCombining = 0xFF, kMaybe = 0x100, kNever = 0x200, kDigit = 0x400, kComposedOf = 0x800;

uint16_t more_of(uint32_t point) { return kMore[kMoreBlock[point >> 8] << 8 | (point & 255)]; }

bool composes(uint32_t first, uint32_t second) {
    // Hangul: a leading consonant with a vowel, a syllable without a final consonant with one.
    if (first - 0x1100 < 19 && second - 0x1161 < 21) return true;
    if (first - 0xAC00 < 11172 && (first - 0xAC00) % 28 == 0 && second - 0x11A8 < 27) return true;
    return std::binary_search(std::begin(kComposed), std::end(kComposed), uint64_t{first} << 32 | second);
}

const uint8_t* skip_ascii(const uint8_t* p, const uint8_t* end) {
    for (uint64_t eight; end - p >= 8; p += 8) {
        std::memcpy(&eight, p, 8);
        if (eight & 0x8080808080808080u) break;
    }
    while (p < end && *p < 0x80) ++p;
    return p;
}

// The length of the sequence at p, 0 if it is not valid (Unicode's table 3-7: no surrogates, nothing overlong).
int sequence_length(const uint8_t* p, const uint8_t* end) {
    const auto next = [&](int i, uint8_t low = 0x80, uint8_t high = 0xBF) { return p[i] >= low && p[i] <= high; };
    const uint8_t a = p[0];
    const auto left = end - p;
    if (a < 0x80) return 1;
    if (a < 0xC2) return 0;
    if (a < 0xE0) return left >= 2 && next(1) ? 2 : 0;
    if (a < 0xF0)
        return left >= 3 && next(1, a == 0xE0 ? 0xA0 : 0x80, a == 0xED ? 0x9F : 0xBF) && next(2) ? 3 : 0;
    if (a < 0xF5)
        return left >= 4 && next(1, a == 0xF0 ? 0x90 : 0x80, a == 0xF4 ? 0x8F : 0xBF) && next(2) && next(3) ? 4 : 0;
    return 0;
}

}  // namespace

bool is_late_digit(uint32_t point) { return more_of(point) & kDigit; }

int64_t invalid_utf8(const uint8_t* text, uint64_t size) {
    const uint8_t *p = text, *end = text + size;
    for (;;) {
        p = skip_ascii(p, end);
        if (p == end) return -1;
        while (p < end && *p >= 0x80) {
            const int length = sequence_length(p, end);
            if (!length) return p - text;
            p += length;
        }
    }
}

bool surely_normal(const uint8_t* text, uint64_t size) {
    const uint8_t *p = text, *end = text + size;
    uint32_t last = 0;  // combining class of the character before
    uint32_t before = 0;
    bool composed = false;  // whether `before` has parts, among which a mark may belong
    while (p < end) {
        if (*p < 0x80) {
            p = skip_ascii(p, end);
            last = 0, before = p[-1], composed = false;
            continue;
        }
        const Character at = decode(p);
        const uint16_t entry = more_of(at.point);
        const uint32_t combining = entry & kCombining;
        if (entry & kNever) return false;
        if (combining && combining < last) return false;  // marks out of order
        // Behind another mark it may still meet the starter before: rare, and left to the library.
        if ((entry & kMaybe) && (last || composed || composes(before, at.point))) return false;
        last = combining, before = at.point, composed = entry & kComposedOf;
        p += at.length;
    }
    return true;
}

}  // namespace mainspring
