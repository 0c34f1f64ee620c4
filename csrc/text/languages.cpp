#include "languages.hpp"

#include <algorithm>
#include <stdexcept>

#include "pieces.hpp"

namespace mainspring {

FunctionWords::FunctionWords(const std::vector<std::vector<std::u32string>>& words) : languages_(words.size()) {
    if (words.size() > 64) throw std::invalid_argument("at most 64 languages");
    size_t total = 0, slots = 16;
    for (const auto& list : words) total += list.size();
    while (slots < 4 * total) slots *= 2;
    words_.assign(slots, Word{0, 0});
    for (size_t language = 0; language < words.size(); ++language)
        for (const std::u32string& word : words[language]) {
            const uint64_t hash = hash_word(word.data(), static_cast<int64_t>(word.size()));
            size_t slot = hash & (slots - 1);
            while (words_[slot].languages != 0 && words_[slot].hash != hash) slot = (slot + 1) & (slots - 1);
            words_[slot].hash = hash;
            words_[slot].languages |= uint64_t{1} << language;
            longest_ = std::max(longest_, word.size());
        }
}

Hints FunctionWords::hints(const Text& text) const {
    Hints result;
    result.scripts.assign(SCRIPTS, 0);
    result.hits.assign(languages_, 0);
    result.kinds.assign(languages_, 0);
    std::vector<int64_t> times(words_.size(), 0);
    const uint16_t* properties = unicode_properties();
    with_width(text, [&](const auto* data, int64_t size) {
        size = std::min(size, LANGUAGE_CHARACTERS);
        for (int64_t i = 0; i < size; ++i) ++result.scripts[properties[data[i]] >> 8];
        result.scripts[0] = 0;
        each_word(data, size, [&](int64_t first, int64_t last) {
            ++result.words;
            if (last - first > static_cast<int64_t>(longest_)) return true;
            const uint64_t hash = hash_word(data + first, last - first);
            size_t slot = hash & (words_.size() - 1);
            while (words_[slot].languages != 0 && words_[slot].hash != hash) slot = (slot + 1) & (words_.size() - 1);
            ++times[slot];
            return true;
        });
    });
    const int64_t at_most = std::max<int64_t>(1, result.words / COUNTED_ONCE_IN);
    for (size_t slot = 0; slot < words_.size(); ++slot) {
        if (times[slot] == 0) continue;
        for (uint64_t bits = words_[slot].languages; bits; bits &= bits - 1) {
            result.hits[static_cast<size_t>(lowest(bits))] += std::min(times[slot], at_most);
            ++result.kinds[static_cast<size_t>(lowest(bits))];
        }
    }
    return result;
}

}  // namespace mainspring
