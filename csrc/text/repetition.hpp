// How much of a document is the same words again: the measures of Rae et al. 2021 (Gopher), table A1.
#pragma once

#include <cstdint>
#include <vector>

#include "unicode.hpp"

namespace mainspring {

// Judged on so many words from the start: memory is bounded, and what repeats itself does so early.
constexpr int64_t MAX_WORDS = 1 << 17;

struct Repetition {
    int64_t characters = 0;  // of all words, without the blanks between them
    // For each n of `top`: characters in all places of the n-gram that covers the most, 0 where none is there twice.
    std::vector<int64_t> top;
    // For each n of `duplicate`: characters in n-grams that stood before, each counted once (from left to right).
    std::vector<int64_t> duplicate;
};

// n-grams of 1 to 64 words, as str.split() gives them.
Repetition repetition(const Text& text, const std::vector<int>& top, const std::vector<int>& duplicate);

}  // namespace mainspring
