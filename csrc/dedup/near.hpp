// Near duplicates of any number of units, from their files of signatures: pairs band by band, then one pass over them.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "exact.hpp"

namespace mainspring {

struct Split {
    uint64_t bands, rows;
};

// The file of a unit: for each band the sorted keys of the documents; then of every document a byte for each of its
// permutations, two of each key, and a checksum. Two numbers that differ agree in the byte by a chance of 1 to 256 (Li
// and König 2010, b-bit minwise hashing), which `matches` must allow for; a quarter of the size is to be read again.
// Documents without a shingle are in no band. std::invalid_argument unless the bands fit.
void encode_signatures(const uint32_t* signatures, uint64_t documents, uint64_t permutations, Split split,
                       uint64_t settings, int threads, const Allocate& allocate);

// Which documents of a unit take part: one byte each, or null for all of them. Valid until the next call.
using Mask = std::function<const uint8_t*(uint64_t unit, uint64_t documents)>;

struct PairOptions {
    uint64_t band, part, parts;  // keys of one band, in range `part` of `parts`
    uint64_t matches;            // equal bytes of two signatures, from which on the documents are the same
    uint64_t settings;           // every file must have been written with these
};

// Pairs of documents with a key of the band in common and enough equal bytes, the later one first, sorted. A pair that
// agrees in an earlier band too is left to that. Of a key with more than 64 documents each is compared with 64 before it:
// the first 32, and then those that resemble none of these. Memory: 64 bytes a document of the range at
// most, and rows for ROWS_AT_ONCE documents.
std::vector<Duplicate> near_pairs(const std::vector<std::string>& paths, const Mask& mask, const PairOptions& options);

// A file of sorted pairs, for `near_clusters`.
void encode_pairs(const std::vector<Duplicate>& pairs, const Allocate& allocate);

// The documents that go, sorted, each with the one that stays for it: in the order of the documents, one goes if it is a
// pair with an earlier one that stays. Memory: the pairs of some units at a time, and 24 bytes for each that goes.
std::vector<Duplicate> near_clusters(const std::vector<std::string>& paths, uint64_t units, uint64_t pairs_at_once);

}  // namespace mainspring
