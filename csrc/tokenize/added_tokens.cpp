#include "added_tokens.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "unicode.hpp"

namespace mainspring {
namespace {

const uint8_t* before(const uint8_t* p) {
    do --p;
    while ((*p & 0xC0) == 0x80);
    return p;
}

bool has(const uint8_t* p, uint8_t bits) { return class_of(decode(p).point) & bits; }

}  // namespace

AddedTokens::AddedTokens(std::vector<AddedToken> tokens) : pairs_(1 << 16) {
    if (std::any_of(tokens.begin(), tokens.end(), [](const AddedToken& token) { return !token.hidden; }))
        tokens_ = std::move(tokens);
    for (const AddedToken& token : tokens_)
        if (token.content.empty() || token.id < 0) throw std::invalid_argument("an added token without text or id");
    std::sort(tokens_.begin(), tokens_.end(), [](const AddedToken& a, const AddedToken& b) {
        const uint8_t x = a.content[0], y = b.content[0];
        return x != y ? x < y : a.content.size() > b.content.size();
    });
    std::fill(first_, first_ + 257, 0);
    for (const AddedToken& token : tokens_) {
        const uint8_t byte = token.content[0];
        first_[byte + 1]++;
        for (int second = 0; second < 256; ++second)
            if (token.content.size() == 1 || uint8_t(token.content[1]) == second) pairs_[byte << 8 | second] = true;
    }
    for (int i = 0; i < 256; ++i) first_[i + 1] += first_[i];
}

const AddedToken* AddedTokens::match(const uint8_t* at, const uint8_t* end) const {
    const uint8_t second = end - at > 1 ? at[1] : 0;
    if (end - at > 1 && !pairs_[*at << 8 | second]) return nullptr;
    for (uint32_t i = first_[*at]; i < first_[*at + 1]; ++i) {
        const std::string& content = tokens_[i].content;
        if (content.size() <= uint64_t(end - at) && !std::memcmp(at, content.data(), content.size())) return &tokens_[i];
    }
    return nullptr;
}

void AddedTokens::split(const uint8_t* begin, const uint8_t* end, std::vector<Piece>& pieces) const {
    const uint8_t *done = begin, *next = begin;
    for (const uint8_t* at = begin; !tokens_.empty() && at < end; at = next) {
        const AddedToken* token = match(at, end);
        next = at + (token ? token->content.size() : 1);
        if (!token || token->hidden) continue;
        const uint8_t *from = at, *to = next;
        if (token->single_word && ((from > begin && has(before(from), kWord)) || (to < end && has(to, kWord)))) continue;
        if (token->strip_left) {
            while (from > done && has(before(from), kSpace)) from = before(from);
            from = std::max(from, done);  // a blank that is a token itself may belong to the one before
        }
        if (token->strip_right)
            while (to < end && has(to, kSpace)) to += decode(to).length;
        if (from > to) continue;  // the library panics
        if (done < from) pieces.push_back({done, from, -1});
        if (from < to) pieces.push_back({from, to, token->id});
        done = to;
    }
    if (done != end) pieces.push_back({done, end, -1});
}

}  // namespace mainspring
