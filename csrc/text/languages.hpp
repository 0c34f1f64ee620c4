// What points to a language: the scripts of the letters, and the function words of each language.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "unicode.hpp"

namespace mainspring {

// Judged on so many characters from the start.
constexpr int64_t LANGUAGE_CHARACTERS = 1 << 16;
// No function word counts more often than once in so many words: names are full of "de", HTML of "li".
constexpr int64_t COUNTED_ONCE_IN = 32;

struct Hints {
    std::vector<int64_t> scripts;  // [SCRIPTS] letters of each
    int64_t words = 0;             // runs of letters and their marks
    std::vector<int64_t> hits;     // [languages] words that are function words of it, each counted so often at most
    std::vector<int64_t> kinds;    // [languages] different ones among them
};

class FunctionWords {
public:
    // words[i]: those of language i, at most 64 languages, in every spelling that counts (lower case, capitalised).
    explicit FunctionWords(const std::vector<std::vector<std::u32string>>& words);
    Hints hints(const Text& text) const;

private:
    struct Word {
        uint64_t hash, languages;  // bit i for language i; 0 marks an empty slot
    };

    size_t languages_;
    size_t longest_ = 0;
    std::vector<Word> words_;  // open addressing
};

}  // namespace mainspring
