#include "words.hpp"

#include <algorithm>
#include <array>
#include <memory>

#include "clones.hpp"
#include "hash.hpp"

namespace mainspring {

namespace {

struct Range {
    uint32_t first, last, kind;
};
struct Lower {
    uint32_t code, lower;
};
#include "unicode_table.inc"

constexpr uint32_t CODES = 0x110000;
constexpr uint64_t BLOCK = 64;  // bytes of text at once; the buffers are longer by one

// kind in the two low bits, above them the distance to the lower case: so equal pages of 256 code points are one.
struct Table {
    std::array<uint16_t, CODES / 256> page{};
    std::vector<std::array<int32_t, 256>> pages;
    Table() {
        const auto all = std::make_unique<std::array<int32_t, CODES>>();
        for (const Range& range : RANGES)
            for (uint32_t code = range.first; code <= range.last; ++code) (*all)[code] = static_cast<int32_t>(range.kind);
        for (const Lower& pair : LOWER)
            (*all)[pair.code] += 4 * (static_cast<int32_t>(pair.lower) - static_cast<int32_t>(pair.code));
        for (uint32_t p = 0; p < page.size(); ++p) {
            std::array<int32_t, 256> mine;
            std::copy_n(all->begin() + p * 256, 256, mine.begin());
            const auto same = std::find(pages.begin(), pages.end(), mine);
            page[p] = static_cast<uint16_t>(same - pages.begin());
            if (same == pages.end()) pages.push_back(mine);
        }
    }
};

const Table& table() {
    static const Table made;
    return made;
}

// Length of the UTF-8 character at `text` and its code point; length 1 and a separator where there is none. Surrogates
// are separators by their kind.
uint64_t decode(const unsigned char* text, uint64_t size, uint32_t& code) {
    code = 0;
    const unsigned char lead = text[0];
    const uint64_t length = lead < 0xc2 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 1;
    if (length == 1 || length > size) return 1;
    uint32_t value = lead & (0x7f >> length);
    for (uint64_t i = 1; i < length; ++i) {
        if ((text[i] & 0xc0) != 0x80) return 1;
        value = value << 6 | (text[i] & 0x3f);
    }
    if (value >= CODES || (length == 3 && value < 0x800) || (length == 4 && value < 0x10000)) return 1;
    code = value;
    return length;
}

uint64_t encode(uint32_t code, char* out) {
    if (code < 0x80) return out[0] = static_cast<char>(code), 1;
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    out[0] = static_cast<char>((0xff00 >> (more + 1) & 0xff) | code >> (6 * more));
    for (int i = 1; i <= more; ++i) out[i] = static_cast<char>(0x80 | (code >> (6 * (more - i)) & 0x3f));
    return more + 1;
}

// ASCII bytes at the beginning.
uint64_t ascii_bytes(const char* text, uint64_t size) {
    uint64_t i = 0;
    while (i + 8 <= size && (load64(text + i) & 0x8080808080808080) == 0) i += 8;
    while (i < size && static_cast<unsigned char>(text[i]) < 0x80) ++i;
    return i;
}

MAINSPRING_CLONES
void lower_ascii(const char* text, uint64_t size, char* __restrict letters, char* __restrict inside) {
    for (uint64_t i = 0; i < size; ++i) {
        const unsigned char byte = text[i];
        const unsigned char low = byte | (static_cast<unsigned char>(byte - 'A') < 26 ? 0x20 : 0);
        letters[i] = static_cast<char>(low);
        inside[i] = (static_cast<unsigned char>(low - 'a') < 26) | (static_cast<unsigned char>(low - '0') < 10);
    }
}

// Bit i of the result: byte i of 64 is 1 (they are all 0 or 1).
uint64_t bits_of(const char* inside) {
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) bits |= (load64(inside + 8 * i) * 0x0102040810204080 >> 56) << (8 * i);
    return bits;
}

int lowest_bit(uint64_t bits) {
#if defined(__GNUC__)
    return __builtin_ctzll(bits);
#else
    int i = 0;
    while (!(bits >> i & 1)) ++i;
    return i;
#endif
}

// Reads up to 7 bytes past the word.
uint64_t word_hash(const char* word, uint64_t size) {
    uint64_t state = size * HASH_B;
    for (; size > 8; word += 8, size -= 8) state = fold(state ^ load64(word), HASH_C) + HASH_A;
    return fold(state ^ (load64(word) & (~uint64_t{0} >> (64 - 8 * size))) ^ HASH_A, HASH_C);
}

}  // namespace

Character character(uint32_t code) {
    if (code >= CODES) return {SEPARATOR, code};
    const int32_t entry = table().pages[table().page[code >> 8]][code & 255];
    return {static_cast<Kind>(entry & 3), static_cast<uint32_t>(static_cast<int32_t>(code) + (entry >> 2))};
}

// Everything that is not ASCII, up to the next ASCII byte; how much of the text that was is written to out_ by the
// caller's arithmetic: returns the new end of the buffers.
uint64_t Shingler::put_other(const char* text, uint64_t size, uint64_t out) {
    for (uint64_t i = 0; i < size;) {
        uint32_t code;
        i += decode(reinterpret_cast<const unsigned char*>(text) + i, size - i, code);
        const Character what = character(code);
        const bool apart = what.kind != WORD;
        if (apart) inside_[out++] = 0;
        if (what.kind == SEPARATOR) continue;
        const uint64_t length = encode(what.lower, &letters_[out]);
        for (uint64_t k = 0; k < length; ++k) inside_[out++] = 1;
        if (apart) inside_[out++] = 0;
    }
    return out;
}

// Fills letters_ and inside_; returns how many bytes of them count.
uint64_t Shingler::normalise(const char* text, uint64_t size) {
    // A lower case of 3 bytes for one of 2, and a single of 3 bytes with its two separators, are the most it grows.
    const uint64_t room = size * 2 + 2 * BLOCK;
    if (letters_.size() < room) {
        letters_.resize(room);
        inside_.resize(room);
    }
    uint64_t out = 0;
    for (uint64_t i = 0; i < size;) {
        const uint64_t ascii = ascii_bytes(text + i, size - i);
        lower_ascii(text + i, ascii, &letters_[out], &inside_[out]);
        out += ascii;
        i += ascii;
        uint64_t other = 0;
        while (i + other < size && static_cast<unsigned char>(text[i + other]) >= 0x80) ++other;
        out = put_other(text + i, other, out);
        i += other;
    }
    std::fill_n(inside_.begin() + static_cast<int64_t>(out), BLOCK, 0);
    return out;
}

const std::vector<uint64_t>& Shingler::word_hashes(const char* text, uint64_t size) {
    const uint64_t end = normalise(text, size);
    hashes_.clear();
    uint64_t carry = 0, start = 0;
    bool open = false;
    for (uint64_t base = 0; base <= end; base += BLOCK) {  // <=: the zero after the last byte ends the last word
        const uint64_t bits = bits_of(&inside_[base]);
        uint64_t edges = bits ^ (bits << 1 | carry);
        carry = bits >> 63;
        for (; edges; edges &= edges - 1) {
            const uint64_t at = base + lowest_bit(edges);
            if (open)
                hashes_.push_back(word_hash(&letters_[start], at - start));
            else
                start = at;
            open = !open;
        }
    }
    return hashes_;
}

const std::vector<uint64_t>& Shingler::shingles(const char* text, uint64_t size) {
    const std::vector<uint64_t>& words = word_hashes(text, size);
    const uint64_t width = static_cast<uint64_t>(words_);
    shingles_.clear();
    if (words.size() < width) return shingles_;
    shingles_.resize(words.size() - width + 1);
    // A polynomial in a random odd number, rolled: the words' hashes are its random coefficients.
    uint64_t top = 1, sum = 0;
    for (uint64_t i = 0; i < width; ++i) top *= HASH_C;
    for (uint64_t i = 0; i < words.size(); ++i) {
        sum = sum * HASH_C + words[i] - (i >= width ? words[i - width] * top : 0);
        if (i + 1 >= width) shingles_[i + 1 - width] = fold(sum ^ HASH_A, HASH_B);
    }
    return shingles_;
}

}  // namespace mainspring
