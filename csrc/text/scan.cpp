#include "scan.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "hash.hpp"
#include "masks.hpp"

namespace mainspring {
namespace {

constexpr int64_t SHORT_LINE = 30;

bool is_bullet(uint32_t c) {
    return c == '-' || c == '*' || c == 0x2022 || c == 0x2023 || c == 0x25E6 || c == 0x25AA || c == 0x25A0 ||
           c == 0x25CF || c == 0x25B6 || c == 0x2013;
}

bool closes(uint32_t c) {  // may follow the mark that ends a sentence
    return c == '"' || c == '\'' || c == ')' || c == ']' || c == 0xBB || c == 0x2019 || c == 0x201D || c == 0x300D ||
           c == 0x300F || c == 0xFF09;
}

bool ends_sentence(uint32_t c) {
    return c == '.' || c == '!' || c == '?' || c == ':' || c == ';' || c == 0x2026 || c == 0x3002 || c == 0xFF01 ||
           c == 0xFF1F || c == 0x0964 || c == 0x061F || c == 0x06D4;
}

// Lines by content, each with the number of the first one like it. Compares the text itself: no verdict hangs on luck.
template <class Char>
class Lines {
public:
    explicit Lines(const Char* data) : data_(data), slots_(64, 0) {}

    // (number of the first line that is data[first, last), whether there was one before)
    std::pair<uint32_t, bool> add(int64_t first, int64_t last) {
        const int64_t bytes = (last - first) * static_cast<int64_t>(sizeof(Char));
        const uint64_t hash = hash_bytes(data_ + first, bytes);
        uint64_t slot = hash & (slots_.size() - 1);
        for (; slots_[slot] != 0; slot = (slot + 1) & (slots_.size() - 1)) {
            const Line& line = lines_[slots_[slot] - 1];
            if (line.hash == hash && line.last - line.first == last - first &&
                std::memcmp(data_ + line.first, data_ + first, static_cast<size_t>(bytes)) == 0)
                return {slots_[slot] - 1, true};
        }
        if (lines_.size() == std::numeric_limits<uint32_t>::max()) throw std::length_error("over 4 billion lines");
        lines_.push_back({hash, first, last});
        slots_[slot] = static_cast<uint32_t>(lines_.size());
        if (2 * lines_.size() > slots_.size()) grow();
        return {static_cast<uint32_t>(lines_.size() - 1), false};
    }

private:
    struct Line {
        uint64_t hash;
        int64_t first, last;
    };

    void grow() {
        slots_.assign(4 * slots_.size(), 0);
        for (size_t i = 0; i < lines_.size(); ++i) {
            uint64_t slot = lines_[i].hash & (slots_.size() - 1);
            while (slots_[slot] != 0) slot = (slot + 1) & (slots_.size() - 1);
            slots_[slot] = static_cast<uint32_t>(i + 1);
        }
    }

    const Char* data_;
    std::vector<Line> lines_;
    std::vector<uint32_t> slots_;  // number of the line + 1
};

// The state between two blocks of 64 characters.
template <class Char>
class Scanner {
public:
    Scanner(const Char* data, int64_t size, bool ascii)
        : data_(data), size_(size), ascii_(ascii), properties_(unicode_properties()), lines_(data) {}

    Statistics run() {
        s_.characters = size_;
        for (int64_t base = 0; base < size_; base += BLOCK) {
            const int length = static_cast<int>(std::min<int64_t>(BLOCK, size_ - base));
            const Masks m = masks_of(data_ + base, length, ascii_, properties_);
            tally(m, base);
            words(m, base, length);
            lines(m, base, length);
            // Of the many "w" only those with another behind them can begin an address.
            const uint64_t starts = m.colon | (m.w & ((m.w >> 1) | uint64_t{1} << 63));
            if (starts) addresses(starts, base);
        }
        if (in_word_) end_word(size_);
        else s_.longest_space = std::max(s_.longest_space, size_ - edge_);
        end_line();
        end_paragraph();
        count_paragraphs();
        return s_;
    }

private:
    void tally(const Masks& m, int64_t base) {
        s_.letters += count(m.letter);
        s_.digits += count(m.digit);
        s_.spaces += count(m.space);
        s_.newlines += count(m.newline);
        if (m.hash) s_.hashes += count(m.hash);
        if (m.ellipsis) s_.ellipses += count(m.ellipsis);
        if (m.dot) dots(m.dot, base);
        if (m.carriage) s_.mend |= CARRIAGE_RETURNS;
        if (m.control) s_.mend |= CONTROLS;
        if (m.page) s_.mend |= PAGE_BREAKS;
        if (m.replacement) s_.replacements += count(m.replacement);
        if (m.surrogate) s_.mend |= SURROGATES;
        if (m.suspect) s_.mend |= NOT_NFC;
    }

    // "..." without overlap, as str.count has it: a run of dots holds a third of its length.
    void dots(uint64_t mask, int64_t base) {
        if (dots_end_ != base && !(mask & (mask >> 1)) && !(mask >> 63)) return;
        for (; mask; mask &= mask - 1) {
            const int64_t at = base + lowest(mask);
            dots_ = dots_end_ == at ? dots_ + 1 : 1;
            dots_end_ = at + 1;
            if (dots_ % 3 == 0) ++s_.ellipses;
        }
    }

    void words(const Masks& m, int64_t base, int length) {
        const uint64_t shown = ~m.space & range_mask(0, length);
        uint64_t edges = (shown ^ ((shown << 1) | (in_word_ ? 1 : 0))) & range_mask(0, length);
        int from = 0;
        for (; edges; edges &= edges - 1) {
            const int bit = lowest(edges);
            if (in_word_) {
                letter_ |= (m.letter & range_mask(from, bit)) != 0;
                end_word(base + bit);
            } else {
                s_.longest_space = std::max(s_.longest_space, base + bit - edge_);
                letter_ = false;
            }
            in_word_ = !in_word_;
            edge_ = base + bit;
            from = bit;
        }
        if (in_word_) letter_ |= (m.letter & range_mask(from, length)) != 0;
    }

    void end_word(int64_t at) {
        ++s_.words;
        s_.alphabetic_words += letter_;
        s_.longest_word = std::max(s_.longest_word, at - edge_);
    }

    void lines(const Masks& m, int64_t base, int length) {
        const uint64_t shown = ~m.space & range_mask(0, length);
        int from = 0;
        for (uint64_t ends = m.newline; ends; ends &= ends - 1) {
            const int bit = lowest(ends);
            extend_line(shown & range_mask(from, bit), base);
            end_line();
            from = bit + 1;
        }
        if (from < length) extend_line(shown & range_mask(from, length), base);
    }

    void extend_line(uint64_t shown, int64_t base) {
        if (!shown) return;
        if (first_ < 0) first_ = base + lowest(shown);
        last_ = base + highest(shown) + 1;
    }

    void end_line() {
        if (first_ < 0) {
            end_paragraph();
            return;
        }
        const int64_t length = last_ - first_;
        const auto [number, repeated] = lines_.add(first_, last_);
        ++s_.lines;
        s_.line_characters += length;
        s_.repeated_lines += repeated;
        s_.repeated_line_characters += repeated ? length : 0;
        s_.short_lines += length <= SHORT_LINE;
        s_.bullet_lines += is_bullet(data_[first_]);
        const uint32_t end = data_[last_ - 1], before = length > 1 ? data_[last_ - 2] : 0;
        s_.ended_lines += ends_sentence(end) || (closes(end) && ends_sentence(before));
        s_.ellipsis_lines += end == 0x2026 || (length > 2 && end == '.' && before == '.' && data_[last_ - 3] == '.');
        paragraph_ = mix(paragraph_ ^ 0x9E3779B97F4A7C15ULL, number + 0xD1B54A32D192ED03ULL);
        paragraph_characters_ += length;
        first_ = -1;
    }

    void end_paragraph() {
        if (paragraph_characters_ == 0) return;
        paragraphs_.push_back({paragraph_, paragraph_characters_});
        paragraph_ = 0;
        paragraph_characters_ = 0;
    }

    void count_paragraphs() {
        s_.paragraphs = static_cast<int64_t>(paragraphs_.size());
        if (s_.repeated_lines == 0) return;  // then none can be like another
        Counts seen;
        seen.reset(s_.paragraphs);
        for (const auto& [hash, characters] : paragraphs_) {
            if (seen.add(hash) == 0) continue;
            ++s_.repeated_paragraphs;
            s_.repeated_paragraph_characters += characters;
        }
    }

    // At the ":" of "://", and at each "w" that another follows.
    void addresses(uint64_t starts, int64_t base) {
        for (; starts; starts &= starts - 1) {
            const int64_t at = base + lowest(starts);
            if (data_[at] == 'w') {
                if (matches(at, "www.")) address(at, at + 4);
            } else if (matches(at, "://")) {
                ++s_.schemes;
                if (at >= 4 && matches(at - 4, "http")) address(at - 4, at + 3);
                else if (at >= 5 && matches(at - 5, "https")) address(at - 5, at + 3);
            }
        }
    }

    bool matches(int64_t at, const char* word) const {
        for (; *word; ++word, ++at)
            if (at >= size_ || data_[at] != static_cast<uint8_t>(*word)) return false;
        return true;
    }

    // An address that starts at `first` and goes on from `rest`, up to a blank, quote or closing bracket.
    void address(int64_t first, int64_t rest) {
        if (first < address_end_) return;
        int64_t end = rest;
        for (; end < size_; ++end) {
            const uint32_t c = data_[end];
            if (properties_[c] & SPACE || c == '<' || c == '>' || c == '"' || c == '\'' || c == ')' || c == ']') break;
        }
        if (end == rest) return;
        ++s_.urls;
        s_.url_characters += end - first;
        address_end_ = end;
    }

    const Char* data_;
    const int64_t size_;
    const bool ascii_;
    const uint16_t* properties_;
    Statistics s_;
    Lines<Char> lines_;
    bool in_word_ = false, letter_ = false;
    int64_t edge_ = 0;                 // where the word, or the gap, began
    int64_t first_ = -1, last_ = 0;    // what shows of the line so far
    int64_t dots_ = 0, dots_end_ = -1;
    int64_t address_end_ = 0;
    uint64_t paragraph_ = 0;
    int64_t paragraph_characters_ = 0;
    std::vector<std::pair<uint64_t, int64_t>> paragraphs_;  // hash of its lines' numbers, characters
};

}  // namespace

Statistics scan(const Text& text) {
    return with_width(text, [&](const auto* data, int64_t size) {
        return Scanner<std::decay_t<decltype(*data)>>(data, size, text.ascii).run();
    });
}

}  // namespace mainspring
