// 64-bit hashes of short pieces of text, and the sets that hold them. The same on every machine of this byte order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace mainspring {

inline uint64_t mix(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

template <class Word>
uint64_t load(const char* data) {
    Word word;
    std::memcpy(&word, data, sizeof(word));
    return word;
}

// In the manner of wyhash: whole words, and the last ones overlapping, so that no length is slow.
inline uint64_t hash_bytes(const void* bytes, int64_t size) {
    constexpr uint64_t K0 = 0xA0761D6478BD642FULL, K1 = 0xE7037ED1A0B428DBULL, K2 = 0x8EBC6AF09C88C6E3ULL;
    const char* data = static_cast<const char*>(bytes);
    const uint64_t length = static_cast<uint64_t>(size);
    uint64_t a = 0, b = 0, seed = K2;
    if (size <= 16) {
        if (size >= 8) {
            a = load<uint64_t>(data);
            b = load<uint64_t>(data + size - 8);
        } else if (size >= 4) {
            a = load<uint32_t>(data);
            b = load<uint32_t>(data + size - 4);
        } else if (size > 0) {
            a = load<uint8_t>(data) | load<uint8_t>(data + size / 2) << 8 | load<uint8_t>(data + size - 1) << 16;
        }
    } else {
        for (; size > 16; size -= 16, data += 16)
            seed = mix(load<uint64_t>(data) ^ K1, load<uint64_t>(data + 8) ^ seed);
        a = load<uint64_t>(data + size - 16);
        b = load<uint64_t>(data + size - 8);
    }
    return mix(K0 ^ length, mix(a ^ K1, b ^ seed));
}

// Hashes with a count each, in open addressing; emptied for every document, so it keeps to the size that one needs.
class Counts {
public:
    void reset(int64_t at_most) {
        uint64_t slots = 16;
        while (slots < 2 * static_cast<uint64_t>(at_most)) slots *= 2;
        mask_ = slots - 1;
        if (keys_.size() < slots) {
            keys_.resize(slots);
            counts_.resize(slots);
        }
        std::fill_n(keys_.begin(), slots, 0);
    }

    // How often `hash` was there before; no more than reset() announced may be added.
    uint32_t add(uint64_t hash) {
        hash += hash == 0;  // 0 marks an empty slot
        uint64_t slot = hash & mask_;
        while (keys_[slot] != 0 && keys_[slot] != hash) slot = (slot + 1) & mask_;
        if (keys_[slot] == 0) {
            keys_[slot] = hash;
            counts_[slot] = 0;
        }
        return counts_[slot]++;
    }

private:
    std::vector<uint64_t> keys_;
    std::vector<uint32_t> counts_;
    uint64_t mask_ = 0;
};

}  // namespace mainspring
