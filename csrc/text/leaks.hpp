// The n-grams of evaluation sets, and whether a document holds one of them.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "unicode.hpp"

namespace mainspring {

// An n-gram that more items of a set share is that set's wording, not an item ("choose the best answer of the …").
constexpr uint32_t MAX_ITEMS = 10;

struct Leak {
    int set;
    int64_t first, last;  // characters of the text that are the n-gram
};

// Words are runs of letters and digits; callers give lower case. Build with add() and finish(), then find() as often
// as wanted and from any thread.
class Leaks {
public:
    Leaks(int n, int shortest);

    // One item of set 0 … 63: all its n-grams, the whole of a shorter one, nothing of one below `shortest` words.
    // Returns its number of words.
    int64_t add(const Text& text, int set);
    // No more items: the table for find(). Returns how many n-grams it holds.
    int64_t finish();
    // The first leak of each set, in order of the text.
    std::vector<Leak> find(const Text& text) const;

private:
    struct Entry {
        uint64_t key;
        int set;
        bool operator<(const Entry& other) const { return key != other.key ? key < other.key : set < other.set; }
    };

    uint64_t sets_of(uint64_t key) const;

    int n_, shortest_;
    std::vector<Entry> entries_;     // one for each item that holds the n-gram, until finish()
    std::vector<int> lengths_;       // of the n-grams in the table, in words, ascending
    std::vector<uint64_t> has_length_;
    std::vector<uint64_t> keys_, sets_;  // open addressing; 0 marks an empty slot
    bool finished_ = false;
};

}  // namespace mainspring
