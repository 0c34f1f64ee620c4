// Texts to ids: byte-level BPE as `tokenizers` does it, the same ids.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "added_tokens.hpp"
#include "merges.hpp"
#include "word_cache.hpp"

namespace mainspring {

// How text is cut into words; see split.hpp.
enum class Pattern { kLlama3, kQwen2, kGpt2, kDigitsGpt2, kGpt4o, kTekken };

struct Model {
    Pattern pattern;
    int32_t byte_ids[256];
    std::vector<Merge> merges;
    std::unordered_map<std::string, int32_t> words;  // taken as they are, without merging (ignore_merges)
    std::vector<AddedToken> raw, normalized;         // looked for in the text, then in what is left of it
    bool normal_form;                                // texts have to be in NFC
};

struct Text {
    const uint8_t* data;
    uint64_t size;
};

struct Encoded {
    std::vector<std::vector<int32_t>> parts;  // one after another, the ids of all texts
    std::vector<int64_t> first;               // the text that each part begins with
    int64_t total = 0;
};

// What a thread works with.
struct Worker {
    ShortWords short_words;
    LongWords long_words;
    MergeScratch scratch;
    std::vector<Piece> pieces, inner;
    std::unique_ptr<int32_t[]> ids;
    uint64_t count = 0, room = 0;

    void reserve(uint64_t more);
};

class Encoder {
  public:
    explicit Encoder(const Model& model);

    // lengths [count]: ids of each text, `end_id` behind each of them if it is not negative. A text that has to be
    // normalised first is left out: its length is -1. Throws std::invalid_argument for text that is not UTF-8.
    Encoded encode(const Text* texts, int64_t count, int32_t end_id, int threads, int64_t* lengths);

    // Ends of the words that the pattern cuts a text into; for tests.
    std::vector<int64_t> words(Text text) const;

  private:
    bool encode_text(const Text& text, Worker& worker) const;
    void encode_piece(const uint8_t* p, const uint8_t* end, const uint8_t* limit, Worker& worker) const;
    template <class Split>
    void encode_words(const uint8_t* p, const uint8_t* end, const uint8_t* limit, Worker& worker) const;
    void encode_unknown(const uint8_t* word, uint64_t size, const uint8_t* limit, Worker& worker) const;
    uint32_t merge(const uint8_t* word, uint64_t size, int32_t* out, Worker& worker) const;
    std::unique_ptr<Worker> take();
    void give_back(std::unique_ptr<Worker> worker);

    Pattern pattern_;
    bool normal_form_;
    Merges merges_;
    std::unordered_map<std::string, int32_t> words_;
    uint64_t longest_word_ = 0;
    AddedTokens raw_, normalized_;
    std::mutex guard_;
    std::vector<std::unique_ptr<Worker>> idle_;  // with what they remember
};

}  // namespace mainspring
