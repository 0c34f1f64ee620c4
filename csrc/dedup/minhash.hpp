// MinHash signatures (Broder 1997) of texts, by double hashing.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mainspring {

struct Text {
    const char* data;
    uint64_t size;
};

// A shingle's 64-bit hash, in two halves u and v, has the 32-bit hash u * a[i] + v in permutation i. v makes each of
// them uniform, and u any two of them independent (exactly so where the difference of their a is odd), so the share of
// equal minima is an estimate of the Jaccard similarity without bias and with the variance J (1 - J) / permutations.
class Minhash {
   public:
    // std::invalid_argument unless permutations is a positive multiple of 16 and words in [1, 32].
    Minhash(int permutations, int words, uint64_t seed);
    // out [texts, permutations]; a text without a shingle gets UNSIGNED in every column. threads 0: available cores;
    // instruction_set: one of instruction_sets(), for tests; -1 the fastest.
    void sign(const std::vector<Text>& texts, int threads, uint32_t* out, int instruction_set = -1) const;
    int permutations() const { return static_cast<int>(factors_.size()); }

   private:
    std::vector<uint32_t> factors_;
    int words_;
};

// How many versions of the innermost loop this machine runs.
int instruction_sets();

constexpr uint32_t UNSIGNED = 0xffffffff;

}  // namespace mainspring
