// Text into words and shingles, as hashes.
//
// A word is a run of letters, marks and digits, in lower case; a character of a script that is written without spaces
// (Han, kana, Thai, ...) is a word of its own. All else separates, bytes that are no UTF-8 too.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mainspring {

enum Kind : uint32_t { SEPARATOR = 0, WORD = 1, SINGLE = 2 };

// What a code point is, and its lower case.
struct Character {
    Kind kind;
    uint32_t lower;
};
Character character(uint32_t code);

// Reused between texts; one a thread.
class Shingler {
   public:
    explicit Shingler(int words) : words_(words) {}
    // A 64-bit hash for every run of `words` consecutive words, none for a text with fewer; valid until the next call.
    const std::vector<uint64_t>& shingles(const char* text, uint64_t size);
    // Of every word, in order; for tests, and as the first half of the above.
    const std::vector<uint64_t>& word_hashes(const char* text, uint64_t size);

   private:
    uint64_t normalise(const char* text, uint64_t size);
    uint64_t put_other(const char* text, uint64_t size, uint64_t out);

    int words_;
    std::vector<char> letters_, inside_;  // lower-case bytes, and for each 1 inside a word, 0 outside
    std::vector<uint64_t> hashes_, shingles_;
};

}  // namespace mainspring
