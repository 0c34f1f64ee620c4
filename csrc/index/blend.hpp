// Which source gives the j-th block of a blend, by a closed form: any position costs O(sources), nothing is kept.
#pragma once

#include <cstdint>
#include <vector>

namespace mainspring {

// Source i's k-th block has the virtual time T_i(k) = k s_i + floor(s_i / 2) with the step s_i = round(2^40 W / w_i),
// W being the sum of the weights; blocks come in the order of (T, i). So one block takes 2^40 of time, and the first j
// blocks hold j w_i / W of source i, give or take (1 + (sources - 2) w_i / W) / 2: each source's count is within half a
// block of T / s_i, and the times of these halves add up over the sources. (For j to 2^41. The rounding of s_i moves a
// share by less than 2^-41 of itself, which is five blocks in 10^13.)
// Everything is in integers: of 128 bits for times, of 64 for times relative to a range's start.
class Blend {
   public:
    // std::invalid_argument unless there are 1 to 65535 weights, all positive, whose sum is below 2^62.
    Blend(const int64_t* weights, int64_t sources);

    int64_t sources() const { return static_cast<int64_t>(steps_.size()); }

    // counts[i]: how many of the first `position` blocks, 0 to 2^62, source i gives.
    void counts(int64_t position, int64_t* counts) const;

    // The position of a source's own-th block, or 2^62 where it comes later than that.
    int64_t rank(int64_t source, int64_t own) const;

    // The source whose own[i]-th block comes before those of the others; -1 where none comes before 2^62. A negative
    // own[i] is no block.
    int64_t earliest(const int64_t* own) const;

    // (source, its own block) of the blocks first, first + 1, ...; `threads` 0: the available cores.
    void range(int64_t first, int64_t count, int threads, uint16_t* source, int64_t* own) const;

    // The same of `count` positions in any order; fastest where they ascend.
    void locate(const int64_t* positions, int64_t count, int64_t* source, int64_t* own) const;

   private:
    using Time = unsigned __int128;

    // The blocks from `position` on, one after the other.
    class Cursor;

    int64_t before(int64_t source, Time time) const;  // how many blocks of a source have a time below this
    bool time_of(int64_t source, int64_t own, Time& time) const;  // false where it is beyond every position

    std::vector<Time> steps_;
};

}  // namespace mainspring
