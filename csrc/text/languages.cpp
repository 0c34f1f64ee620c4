#include "languages.hpp"

#include <algorithm>
#include <stdexcept>

#include "pieces.hpp"

namespace mainspring {

FunctionWords::FunctionWords(const std::vector<std::vector<std::u32string>>& words) : languages_(words.size()) {
    if (words.size() > 64) throw std::invalid_argument("at most 64 languages");
    for (size_t language = 0; language < words.size(); ++language)
        for (const std::u32string& word : words[language]) {
            of_[hash_word(word.data(), static_cast<int64_t>(word.size()))] |= uint64_t{1} << language;
            longest_ = std::max(longest_, word.size());
        }
}

Hints FunctionWords::hints(const Text& text) const {
    Hints result;
    result.scripts.assign(SCRIPTS, 0);
    result.hits.assign(languages_, 0);
    const uint16_t* properties = unicode_properties();
    with_width(text, [&](const auto* data, int64_t size) {
        size = std::min(size, LANGUAGE_CHARACTERS);
        for (int64_t i = 0; i < size; ++i) ++result.scripts[properties[data[i]] >> 8];
        result.scripts[0] = 0;
        each_word(data, size, [&](int64_t first, int64_t last) {
            ++result.words;
            if (last - first > static_cast<int64_t>(longest_)) return true;
            const auto found = of_.find(hash_word(data + first, last - first));
            if (found != of_.end())
                for (uint64_t bits = found->second; bits; bits &= bits - 1) ++result.hits[lowest(bits)];
            return true;
        });
    });
    return result;
}

}  // namespace mainspring
