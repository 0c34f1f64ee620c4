#include "samples.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace mainspring {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

// The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that passes BigCrush on a counter.
uint64_t mix(uint64_t z) {
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

}  // namespace

uint64_t stream_key(uint64_t seed, uint64_t epoch, uint64_t purpose) {
    uint64_t key = mix(seed + kGolden);
    key = mix((key ^ epoch) + kGolden);
    return mix((key ^ purpose) + kGolden);
}

void shuffle(uint64_t key, int64_t count, int64_t* order) {
    std::iota(order, order + count, int64_t{0});
    Stream stream{key};
    for (int64_t i = count - 1; i > 0; --i) std::swap(order[i], order[stream.below(static_cast<uint64_t>(i) + 1)]);
}

void sample_starts(Unaligned<int32_t> sizes, const int64_t* order, int64_t documents, int64_t stride, int64_t count,
                   int64_t* starts) {
    int64_t position = 0, offset = 0;
    for (int64_t b = 0; b < count; ++b, offset += stride) {
        while (true) {
            if (position >= documents) throw std::out_of_range("a sample would begin past the last token");
            const int64_t document = order[position];
            if (document < 0 || document >= documents) throw std::out_of_range("order names no document");
            if (offset < sizes[document]) break;
            offset -= sizes[document];
            ++position;
        }
        starts[2 * b] = position;
        starts[2 * b + 1] = offset;
    }
}

void blend(const int64_t* weights, int64_t sources, int64_t* deficits, int64_t* counts, int64_t steps,
           uint16_t* source, int64_t* block) {
    const int64_t total = std::accumulate(weights, weights + sources, int64_t{0});
    for (int64_t step = 0; step < steps; ++step) {
        int64_t chosen = 0;
        for (int64_t i = 0; i < sources; ++i) {
            deficits[i] += weights[i];
            if (deficits[i] > deficits[chosen]) chosen = i;
        }
        deficits[chosen] -= total;
        source[step] = static_cast<uint16_t>(chosen);
        block[step] = counts[chosen]++;
    }
}

}  // namespace mainspring
