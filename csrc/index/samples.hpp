// Where samples begin, in which order they come, and from which source: all in 64-bit integers, no floating point,
// so that every platform gives the same order.
#pragma once

#include <cstdint>

#include "format.hpp"

namespace mainspring {

// One of the independent random streams of (seed, epoch): purpose 0 orders documents, 1 orders blocks.
uint64_t stream_key(uint64_t seed, uint64_t epoch, uint64_t purpose);

// order[0..count) becomes a uniformly drawn permutation (Fisher-Yates on splitmix64).
void shuffle(uint64_t key, int64_t count, int64_t* order);

// The documents order[0], order[1], ... are one row of tokens. starts[b] = {position in order, offset in that
// document} of token b * stride. Empty documents are stepped over. std::out_of_range past the last token.
void sample_starts(Unaligned<int32_t> sizes, const int64_t* order, int64_t documents, int64_t stride, int64_t count,
                   int64_t* starts);

// Largest deficit: every step each source is owed weights[i] more, the one owed most (the first, on a tie) gives its
// next block and pays the sum of the weights. deficits and counts are the state, and continue from call to call.
void blend(const int64_t* weights, int64_t sources, int64_t* deficits, int64_t* counts, int64_t steps,
           uint16_t* source, int64_t* block);

}  // namespace mainspring
