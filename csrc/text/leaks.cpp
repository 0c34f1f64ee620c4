#include "leaks.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "pieces.hpp"

namespace mainspring {
namespace {

constexpr uint64_t BASE = 0x9E3779B97F4A7C15ULL;  // odd: hashes of words are the digits of a number modulo 2^64

struct Word {
    uint64_t digits;  // the number that all words up to this one are
    int64_t first;
};

uint64_t key_of(uint64_t digits, int length) {
    const uint64_t key = mix(digits ^ 0xE7037ED1A0B428DBULL, 2 * static_cast<uint64_t>(length) + BASE);
    return key + (key == 0);
}

std::vector<uint64_t> powers_to(int n) {
    std::vector<uint64_t> powers(static_cast<size_t>(n) + 1, 1);
    for (int i = 1; i <= n; ++i) powers[i] = powers[i - 1] * BASE;
    return powers;
}

}  // namespace

Leaks::Leaks(int n, int shortest)
    : n_(n), shortest_(shortest), has_length_(static_cast<size_t>(std::max(n, 0)) + 1, 0) {
    if (n < 1 || n > 1000 || shortest < 1 || shortest > n)
        throw std::invalid_argument("need 1 <= shortest <= n <= 1000");
}

int64_t Leaks::add(const Text& text, int set) {
    if (finished_) throw std::logic_error("finish() was called");
    if (set < 0 || set > 63) throw std::invalid_argument("sets are numbered 0 to 63");
    std::vector<uint64_t> words;
    with_width(text, [&](const auto* data, int64_t size) {
        each_word(data, size, [&](int64_t first, int64_t last) {
            words.push_back(hash_word(data + first, last - first));
            return true;
        });
    });
    const int64_t count = static_cast<int64_t>(words.size());
    if (count < shortest_) return count;
    const int length = static_cast<int>(std::min<int64_t>(n_, count));
    has_length_[static_cast<size_t>(length)] = 1;
    const uint64_t power = powers_to(length).back();
    std::vector<uint64_t> keys;
    uint64_t digits = 0;
    for (int64_t i = 0; i < count; ++i) {
        digits = digits * BASE + words[static_cast<size_t>(i)];
        if (i >= length) digits -= words[static_cast<size_t>(i - length)] * power;
        if (i + 1 >= length) keys.push_back(key_of(digits, length));
    }
    std::sort(keys.begin(), keys.end());
    keys.erase(std::unique(keys.begin(), keys.end()), keys.end());  // once for each item
    for (const uint64_t key : keys) entries_.push_back({key, set});
    return count;
}

int64_t Leaks::finish() {
    if (finished_) throw std::logic_error("finish() was called");
    finished_ = true;
    for (int length = 1; length <= n_; ++length)
        if (has_length_[static_cast<size_t>(length)]) lengths_.push_back(length);
    std::sort(entries_.begin(), entries_.end());
    std::vector<std::pair<uint64_t, uint64_t>> kept;
    for (size_t i = 0; i < entries_.size();) {
        size_t end = i;
        while (end < entries_.size() && !(entries_[i] < entries_[end])) ++end;
        if (end - i <= MAX_ITEMS) {
            const uint64_t bit = uint64_t{1} << entries_[i].set;
            if (!kept.empty() && kept.back().first == entries_[i].key) kept.back().second |= bit;
            else kept.emplace_back(entries_[i].key, bit);
        }
        i = end;
    }
    std::vector<Entry>().swap(entries_);
    uint64_t slots = 16;
    while (slots < 2 * kept.size()) slots *= 2;
    keys_.assign(slots, 0);
    sets_.assign(slots, 0);
    for (const auto& [key, sets] : kept) {
        uint64_t slot = key & (slots - 1);
        while (keys_[slot] != 0) slot = (slot + 1) & (slots - 1);
        keys_[slot] = key;
        sets_[slot] = sets;
    }
    return static_cast<int64_t>(kept.size());
}

uint64_t Leaks::sets_of(uint64_t key) const {
    const uint64_t mask = keys_.size() - 1;
    for (uint64_t slot = key & mask; keys_[slot] != 0; slot = (slot + 1) & mask)
        if (keys_[slot] == key) return sets_[slot];
    return 0;
}

std::vector<Leak> Leaks::find(const Text& text) const {
    if (!finished_) throw std::logic_error("finish() first");
    std::vector<Leak> found;
    if (lengths_.empty()) return found;
    const std::vector<uint64_t> powers = powers_to(n_);
    const size_t ring = static_cast<size_t>(n_) + 1;
    std::vector<Word> last_words(ring, Word{0, 0});
    uint64_t seen = 0, digits = 0;
    size_t count = 0;
    with_width(text, [&](const auto* data, int64_t size) {
        each_word(data, size, [&](int64_t first, int64_t last) {
            digits = digits * BASE + hash_word(data + first, last - first);
            last_words[++count % ring] = {digits, first};
            for (const int length : lengths_) {
                if (static_cast<size_t>(length) > count) break;
                const Word& before = last_words[(count - static_cast<size_t>(length)) % ring];
                const uint64_t window = digits - before.digits * powers[static_cast<size_t>(length)];
                for (uint64_t sets = sets_of(key_of(window, length)) & ~seen; sets; sets &= sets - 1) {
                    const Word& start = last_words[(count - static_cast<size_t>(length) + 1) % ring];
                    found.push_back({lowest(sets), start.first, last});
                    seen |= sets & -sets;
                }
            }
            return true;
        });
    });
    return found;
}

}  // namespace mainspring
