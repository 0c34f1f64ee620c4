// Copies token ranges that cross document boundaries out of the mapped .bin file, widened to 64-bit.
#pragma once

#include <cstdint>

#include "format.hpp"

namespace mainspring {

struct Corpus {
    const char* bin;
    int64_t bin_bytes;
    int dtype_code;
    Unaligned<int32_t> sizes;
    Unaligned<int64_t> pointers;
    const int64_t* order;  // document order in which the tokens form one row
    int64_t documents;
};

struct Range {
    int64_t low, high;  // smallest and largest token seen; low > high when nothing was read
};

// Piece p: `length` tokens and the one after them, from `offset` tokens after the start of document order[position]
// (the offset may lie documents further on). tokens[out..out+length) and labels[out..], the same shifted by one.
// pieces has rows {position, offset, length, out}. std::out_of_range when a piece leaves the corpus or the outputs.
Range gather(const Corpus& corpus, const int64_t* pieces, int64_t count, int64_t* tokens, int64_t* labels,
             int64_t capacity);

}  // namespace mainspring
