// Byte-pair encoding of one word: of all neighbours that may be merged, the pair of lowest rank first, the leftmost of
// equal ones, until none is left.
#pragma once

#include <cstdint>
#include <vector>

namespace mainspring {

struct Merge {
    int32_t left, right, result;  // ids; the rank is the place in the list
};

// Room for the work on one word, kept from word to word.
struct MergeScratch {
    std::vector<int32_t> ids, result;
    std::vector<uint32_t> rank, before, after;
    std::vector<uint64_t> heap;
};

class Merges {
  public:
    // byte_ids [256]: the id of each byte, -1 for one that the vocabulary lacks (it is left out, as the library does).
    // A pair that comes twice has its last rank. Throws std::invalid_argument for ids that are negative.
    Merges(const int32_t* byte_ids, const std::vector<Merge>& merges);

    // Ids of the word, at most `size` of them, to `out`; returns their number. size < 2^31.
    uint32_t encode(const uint8_t* word, uint32_t size, int32_t* out, MergeScratch& scratch) const;

  private:
    struct Entry {
        uint64_t pair;
        uint32_t rank;
        int32_t result;
    };
    static constexpr uint64_t kNoPair = ~uint64_t{0};
    static constexpr uint32_t kNoRank = ~uint32_t{0};

    const Entry& find(int32_t left, int32_t right) const {
        const uint64_t pair = uint64_t(uint32_t(left)) << 32 | uint32_t(right);
        for (uint64_t i = (pair * 0x9E3779B97F4A7C15u) >> shift_;; ++i) {
            const Entry& entry = table_[i & mask_];
            if (entry.pair == pair || entry.pair == kNoPair) return entry;
        }
    }
    uint32_t encode_short(uint32_t count, int32_t* out, MergeScratch& scratch) const;
    uint32_t encode_long(uint32_t count, int32_t* out, MergeScratch& scratch) const;

    int32_t byte_ids_[256];
    std::vector<Entry> table_;
    uint64_t mask_;
    int shift_;
};

}  // namespace mainspring
