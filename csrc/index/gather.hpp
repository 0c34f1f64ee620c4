// Copies ranges of tokens that cross documents out of the mapped .bin files, widened to 64-bit.
#pragma once

#include <cstdint>
#include <vector>

#include "corpus.hpp"
#include "samples.hpp"

namespace mainspring {

struct Range {
    int64_t low, high;  // smallest and largest token seen; low > high when nothing was read
};

struct Batch {
    int64_t *tokens, *labels, capacity;  // of each, in tokens
    int threads;
};

// Piece p = {source, turn, offset, length, out}: of the source's turn-th block, counted through its epochs, `length`
// tokens from `offset` on go to tokens[out..out+length), and each one's successor to labels. What was seen, by source.
// std::out_of_range when a piece leaves its block or the batch, Truncated when a file shrank.
std::vector<Range> gather_blocks(const std::vector<const SampleOrder*>& sources, const int64_t* pieces, int64_t count,
                                 const Batch& batch);

// Piece p = {token, length, out}: the same from a token of all documents in the order of the files.
Range gather_rows(const Corpus& corpus, const int64_t* pieces, int64_t count, const Batch& batch);

}  // namespace mainspring
