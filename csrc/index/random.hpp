// Numbers that depend on a key and nothing else: integers only, so every platform draws the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mainspring {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

// The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that passes BigCrush on a counter.
inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

struct Stream {
    uint64_t state;
    uint64_t next() { return mix(state += kGolden); }

    // Uniform in [0, bound), without bias (Lemire 2019, "Fast random integer generation in an interval").
    uint64_t below(uint64_t bound) {
        unsigned __int128 product = static_cast<unsigned __int128>(next()) * bound;
        if (static_cast<uint64_t>(product) < bound) {
            const uint64_t threshold = (0 - bound) % bound;
            while (static_cast<uint64_t>(product) < threshold)
                product = static_cast<unsigned __int128>(next()) * bound;
        }
        return static_cast<uint64_t>(product >> 64);
    }
};

// A key below another: one of its independent streams.
inline uint64_t subkey(uint64_t key, uint64_t word) { return mix((key ^ word) + kGolden); }

// The stream of (seed, epoch, purpose).
inline uint64_t stream_key(uint64_t seed, uint64_t epoch, uint64_t purpose) {
    return subkey(subkey(mix(seed + kGolden), epoch), purpose);
}

// order[0..count) becomes a uniformly drawn permutation (Fisher-Yates on splitmix64).
template <class Integer>
void shuffle(uint64_t key, int64_t count, Integer* order) {
    for (int64_t i = 0; i < count; ++i) order[i] = static_cast<Integer>(i);
    Stream stream{key};
    for (int64_t i = count - 1; i > 0; --i) {
        const uint64_t other = stream.below(static_cast<uint64_t>(i) + 1);
        const Integer held = order[i];
        order[i] = order[other];
        order[other] = held;
    }
}

// A permutation of [0, count) whose images are computed one at a time. Up to kTable places it is shuffle()'s, in a table,
// since a network is far from uniform on few places. Above that a Feistel network (Luby, Rackoff 1988) of kRounds rounds
// of mix() permutes the next power of two, and a value that falls outside is sent through again until it is inside
// (cycle walking, Black and Rogaway 2002): less than twice on average.
class Permutation {
   public:
    static constexpr int64_t kTable = 1 << 16;
    static constexpr int kRounds = 8;

    Permutation(uint64_t key, int64_t count);
    int64_t operator()(int64_t place) const;
    int64_t count() const { return count_; }

   private:
    int64_t count_;
    int high_bits_ = 0, low_bits_ = 0;
    uint64_t keys_[kRounds] = {};
    std::vector<uint32_t> table_;
};

}  // namespace mainspring
