#include "minhash.hpp"

#include <algorithm>
#include <stdexcept>

#include "clones.hpp"
#include "hash.hpp"
#include "parallel.hpp"
#include "words.hpp"

namespace mainspring {

namespace {

using Minima = void (*)(const uint64_t* hashes, uint64_t count, const uint32_t* factors, uint32_t* minima);

#if defined(__GNUC__) && !defined(__clang__)

// minima[j] = min over hashes of u * factors[j] + v, for 64 permutations that stay in registers meanwhile. The vectors
// are as wide as the instruction set's: GCC takes wider ones to pieces, number by number.
template <int WIDTH>
[[gnu::always_inline]] inline void minima_in(const uint64_t* hashes, uint64_t count, const uint32_t* factors,
                                             uint32_t* minima) {
    typedef uint32_t Lanes __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
    for (int j = 0; j < 64; j += 4 * WIDTH) {
        const Lanes* f = reinterpret_cast<const Lanes*>(factors + j);
        const Lanes f0 = f[0], f1 = f[1], f2 = f[2], f3 = f[3];
        Lanes m0 = ~Lanes{}, m1 = m0, m2 = m0, m3 = m0;
        for (uint64_t i = 0; i < count; ++i) {
            const uint32_t u = static_cast<uint32_t>(hashes[i]), v = static_cast<uint32_t>(hashes[i] >> 32);
            const Lanes h0 = f0 * u + v, h1 = f1 * u + v, h2 = f2 * u + v, h3 = f3 * u + v;
            m0 = h0 < m0 ? h0 : m0;
            m1 = h1 < m1 ? h1 : m1;
            m2 = h2 < m2 ? h2 : m2;
            m3 = h3 < m3 ? h3 : m3;
        }
        Lanes* m = reinterpret_cast<Lanes*>(minima + j);
        m[0] = m0, m[1] = m1, m[2] = m2, m[3] = m3;
    }
}

void minima_plain(const uint64_t* hashes, uint64_t count, const uint32_t* factors, uint32_t* minima) {
    minima_in<4>(hashes, count, factors, minima);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void minima_avx2(const uint64_t* hashes, uint64_t count, const uint32_t* factors,
                                                 uint32_t* minima) {
    minima_in<8>(hashes, count, factors, minima);
}

__attribute__((target("avx512f"))) void minima_avx512(const uint64_t* hashes, uint64_t count, const uint32_t* factors,
                                                      uint32_t* minima) {
    minima_in<16>(hashes, count, factors, minima);
}
#endif

#else

void minima_plain(const uint64_t* hashes, uint64_t count, const uint32_t* factors, uint32_t* minima) {
    std::fill_n(minima, 64, UNSIGNED);
    for (uint64_t i = 0; i < count; ++i) {
        const uint32_t u = static_cast<uint32_t>(hashes[i]), v = static_cast<uint32_t>(hashes[i] >> 32);
        for (int j = 0; j < 64; ++j) minima[j] = std::min(minima[j], u * factors[j] + v);
    }
}

#endif

// What this machine runs, the fastest last; all give the same.
std::vector<Minima> usable() {
    std::vector<Minima> found{minima_plain};
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) found.push_back(minima_avx2);
    if (__builtin_cpu_supports("avx512f")) found.push_back(minima_avx512);
#endif
    return found;
}

// Steele, Lea, Flood 2014.
uint64_t splitmix(uint64_t& state) {
    uint64_t z = state += HASH_A;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

constexpr int64_t TEXTS_AT_ONCE = 32;

}  // namespace

int instruction_sets() { return static_cast<int>(usable().size()); }

Minhash::Minhash(int permutations, int words, uint64_t seed) : words_(words) {
    if (permutations < 16 || permutations % 16 || permutations > 65536)
        throw std::invalid_argument("permutations must be a positive multiple of 16");
    if (words < 1 || words > 32) throw std::invalid_argument("a shingle has 1 to 32 words");
    uint64_t state = seed;
    for (int i = 0; i < permutations; ++i) factors_.push_back(static_cast<uint32_t>(splitmix(state) >> 32));
}

void Minhash::sign(const std::vector<Text>& texts, int threads, uint32_t* out, int instruction_set) const {
    const std::vector<Minima> found = usable();
    const Minima minima = instruction_set < 0 ? found.back() : found.at(instruction_set);
    const uint64_t columns = factors_.size();
    std::vector<uint32_t> factors(factors_);
    factors.resize((columns + 63) / 64 * 64);
    parallel_ranges(static_cast<int64_t>(texts.size()), TEXTS_AT_ONCE, threads, [&](int64_t first, int64_t last) {
        static thread_local std::vector<uint32_t> row;
        row.resize(factors.size());
        Shingler shingler(words_);
        for (int64_t i = first; i < last; ++i) {
            const std::vector<uint64_t>& hashes = shingler.shingles(texts[i].data, texts[i].size);
            for (uint64_t j = 0; j < factors.size(); j += 64)
                minima(hashes.data(), hashes.size(), &factors[j], &row[j]);
            std::copy_n(row.begin(), columns, out + static_cast<uint64_t>(i) * columns);
        }
    });
}

}  // namespace mainspring
