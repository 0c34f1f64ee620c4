// The one 64-bit hash of this room: checksums of files, words, shingles and band keys.
#pragma once

#include <cstdint>
#include <cstring>

namespace mainspring {

constexpr uint64_t HASH_A = 0x9e3779b97f4a7c15, HASH_B = 0xd6e8feb86659fd93, HASH_C = 0xa0761d6478bd642f;

inline uint64_t load64(const void* at) {
    uint64_t value;
    std::memcpy(&value, at, 8);
    return value;
}

// Both halves of a 128-bit product, folded: every bit of the factors reaches every bit of the result.
inline uint64_t fold(uint64_t a, uint64_t b) {
#if defined(__SIZEOF_INT128__)
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
#else
    const uint64_t a0 = a & 0xffffffff, a1 = a >> 32, b0 = b & 0xffffffff, b1 = b >> 32;
    const uint64_t middle = (a0 * b0 >> 32) + (a1 * b0 & 0xffffffff) + a0 * b1;
    return a * b ^ (a1 * b1 + (a1 * b0 >> 32) + (middle >> 32));
#endif
}

inline uint64_t mix(uint64_t value, uint64_t seed) { return fold(value ^ HASH_A, seed ^ HASH_B); }

// Any number of bytes; not for adversaries.
inline uint64_t hash_bytes(const void* data, uint64_t size, uint64_t seed) {
    const char* at = static_cast<const char*>(data);
    uint64_t state = mix(size, seed);
    if (size >= 32) {  // four chains, for a product waits for the one before it
        uint64_t chains[4] = {state, state + HASH_A, state + HASH_B, state + HASH_C};
        for (; size >= 32; at += 32, size -= 32)
            for (int i = 0; i < 4; ++i) chains[i] = fold(chains[i] ^ load64(at + 8 * i), HASH_C) + HASH_A;
        state = fold(chains[0] ^ HASH_A, chains[1] ^ HASH_B) + fold(chains[2] ^ HASH_A, chains[3] ^ HASH_B);
    }
    for (; size >= 8; at += 8, size -= 8) state = fold(state ^ load64(at), HASH_C) + HASH_A;
    uint64_t rest = 0;
    if (size) std::memcpy(&rest, at, size);
    return mix(fold(state ^ rest, HASH_C), size);
}

}  // namespace mainspring
