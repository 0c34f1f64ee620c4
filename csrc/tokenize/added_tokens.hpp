// Tokens that are found in a text before it is cut into words, whatever stands around them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mainspring {

struct AddedToken {
    std::string content;
    int32_t id;
    bool hidden;  // spelt out like other text; yet what it covers is not looked at again
    bool single_word, strip_left, strip_right;
};

// A piece of text, or a token in it (id >= 0).
struct Piece {
    const uint8_t* begin;
    const uint8_t* end;
    int32_t id;
};

class AddedTokens {
  public:
    // Where no token is visible, there is nothing to look for.
    explicit AddedTokens(std::vector<AddedToken> tokens);

    bool empty() const { return tokens_.empty(); }

    // The text as pieces, in order: leftmost matches, of those that begin there the longest. They are appended.
    void split(const uint8_t* begin, const uint8_t* end, std::vector<Piece>& pieces) const;

  private:
    const AddedToken* match(const uint8_t* at, const uint8_t* end) const;

    std::vector<AddedToken> tokens_;  // by first byte, of these the longest first
    uint32_t first_[257];             // where the tokens of each first byte begin
    std::vector<bool> pairs_;         // whether a token begins with these two bytes
};

}  // namespace mainspring
