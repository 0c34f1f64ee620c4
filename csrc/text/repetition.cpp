#include "repetition.hpp"

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "hash.hpp"
#include "pieces.hpp"

namespace mainspring {
namespace {

struct Words {
    std::vector<uint64_t> hashes;
    std::vector<int64_t> before;  // characters of the words before each one, and of all
};

template <class Char>
Words words_of(const Char* data, int64_t size, bool ascii) {
    Words words;
    words.before.push_back(0);
    each_piece(data, size, ascii, [&](int64_t first, int64_t last) {
        words.hashes.push_back(hash_bytes(data + first, (last - first) * static_cast<int64_t>(sizeof(Char))));
        words.before.push_back(words.before.back() + last - first);
        return static_cast<int64_t>(words.hashes.size()) < MAX_WORDS;
    });
    return words;
}

// The n-gram that starts at each word. 64 bits: among 131,072 of them two are confused once in 10^9 documents.
std::vector<uint64_t> ngrams(const std::vector<uint64_t>& words, int n) {
    std::vector<uint64_t> hashes(words.size() < static_cast<size_t>(n) ? 0 : words.size() - n + 1);
    for (size_t i = 0; i < hashes.size(); ++i) {
        uint64_t hash = static_cast<uint64_t>(n);
        for (int k = 0; k < n; ++k) hash = mix(hash ^ words[i + k], 0xE7037ED1A0B428DBULL);
        hashes[i] = hash;
    }
    return hashes;
}

int64_t most_covering(const Words& words, int n, Counts& counts) {
    const std::vector<uint64_t> hashes = ngrams(words.hashes, n);
    counts.reset(static_cast<int64_t>(hashes.size()));
    int64_t most = 0;
    for (size_t i = 0; i < hashes.size(); ++i) {
        const int64_t times = counts.add(hashes[i]) + int64_t{1};
        if (times > 1) most = std::max(most, times * (words.before[i + n] - words.before[i]));
    }
    return most;
}

int64_t duplicated(const Words& words, int n, Counts& counts) {
    const std::vector<uint64_t> hashes = ngrams(words.hashes, n);
    counts.reset(static_cast<int64_t>(hashes.size()));
    int64_t characters = 0;
    for (size_t i = 0; i < hashes.size();) {
        const bool before = counts.add(hashes[i]) > 0;
        if (before) characters += words.before[i + n] - words.before[i];
        i += before ? static_cast<size_t>(n) : 1;
    }
    return characters;
}

}  // namespace

Repetition repetition(const Text& text, const std::vector<int>& top, const std::vector<int>& duplicate) {
    for (const auto* sizes : {&top, &duplicate})
        for (const int n : *sizes)
            if (n < 1 || n > 64) throw std::invalid_argument("n-grams have 1 to 64 words");
    const Words words =
        with_width(text, [&](const auto* data, int64_t size) { return words_of(data, size, text.ascii); });
    Repetition result;
    Counts counts;
    result.characters = words.before.back();
    for (const int n : top) result.top.push_back(most_covering(words, n, counts));
    for (const int n : duplicate) result.duplicate.push_back(duplicated(words, n, counts));
    return result;
}

}  // namespace mainspring
