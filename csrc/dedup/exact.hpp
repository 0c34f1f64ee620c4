// Equal documents of any number of units, from their sorted runs of digests.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "file.hpp"

namespace mainspring {

// A document that goes, and the one that stays for it.
struct Duplicate {
    uint32_t unit, document, first_unit, first_document;
};

// The file of a unit: digests [count, 2], the row is the document's number. std::length_error past 2^32 documents.
void encode_run(const uint64_t* digests, uint64_t count, const Allocate& allocate);

// Documents whose digest lies in range `part` of `parts` and occurred before, in the order of `paths` (unit u is
// paths[u]) and of the documents within, sorted. Memory: 72 bytes a document of the range at most, one file open at a time.
std::vector<Duplicate> exact_duplicates(const std::vector<std::string>& paths, uint64_t part, uint64_t parts);

}  // namespace mainspring
