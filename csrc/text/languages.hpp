// What points to a language: the scripts of the letters, and the function words of each language.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "unicode.hpp"

namespace mainspring {

// Judged on so many characters from the start.
constexpr int64_t LANGUAGE_CHARACTERS = 1 << 16;

struct Hints {
    std::vector<int64_t> scripts;  // [SCRIPTS] letters of each
    int64_t words = 0;             // runs of letters and their marks
    std::vector<int64_t> hits;     // [languages] words that are function words of it
};

class FunctionWords {
public:
    // words[i]: those of language i, at most 64 languages, in every spelling that counts (lower case, capitalised).
    explicit FunctionWords(const std::vector<std::vector<std::u32string>>& words);
    Hints hints(const Text& text) const;

private:
    size_t languages_;
    size_t longest_ = 0;
    std::unordered_map<uint64_t, uint64_t> of_;  // hash of a word -> bit i for language i
};

}  // namespace mainspring
