#include "encoder.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "parallel.hpp"
#include "split.hpp"
#include "unicode.hpp"

namespace mainspring {
namespace {

// Bytes of text that a thread takes at a time: enough to forget what starting costs, little enough to share evenly.
constexpr uint64_t kShare = 1 << 19;
constexpr uint64_t kLongestText = uint64_t{1} << 31;  // places in a word are 32-bit
constexpr uint64_t kScratchKept = 1 << 20;            // bytes of the longest word that room is kept for

template <class Body>
auto with_pattern(Pattern pattern, const Body& body) {
    switch (pattern) {
        case Pattern::kLlama3: return body(Llama3<3>{});
        case Pattern::kQwen2: return body(Llama3<1>{});
        case Pattern::kGpt2: return body(Gpt2<>{});
        case Pattern::kDigitsGpt2: return body(DigitsGpt2{});
        case Pattern::kGpt4o: return body(CaseSplit<3, true>{});
        case Pattern::kTekken: break;
    }
    return body(CaseSplit<1, false>{});
}

}  // namespace

void Worker::reserve(uint64_t more) {
    if (count + more <= room) return;
    const uint64_t wanted = std::max(count + more, 2 * room);
    std::unique_ptr<int32_t[]> larger(new int32_t[wanted]);
    if (count) std::memcpy(larger.get(), ids.get(), count * sizeof(int32_t));
    ids = std::move(larger), room = wanted;
}

Encoder::Encoder(const Model& model)
    : pattern_(model.pattern), normal_form_(model.normal_form), merges_(model.byte_ids, model.merges),
      words_(model.words), raw_(model.raw), normalized_(model.normalized) {
    for (const auto& word : words_) longest_word_ = std::max<uint64_t>(longest_word_, word.first.size());
}

uint32_t Encoder::merge(const uint8_t* word, uint64_t size, int32_t* out, Worker& worker) const {
    if (size <= longest_word_) {
        const auto found = words_.find(std::string(reinterpret_cast<const char*>(word), size));
        if (found != words_.end()) {
            *out = found->second;
            return 1;
        }
    }
    const uint32_t count = merges_.encode(word, static_cast<uint32_t>(size), out, worker.scratch);
    if (size > kScratchKept) worker.scratch = {};
    return count;
}

// A word that is not among the short ones: `limit` ends the memory that may be read.
void Encoder::encode_unknown(const uint8_t* word, uint64_t size, const uint8_t* limit, Worker& worker) const {
    int32_t* out = worker.ids.get() + worker.count;
    if (size > LongWords::kBytes) {
        worker.count += merge(word, size, out, worker);
        return;
    }
    const uint32_t bytes = static_cast<uint32_t>(size);
    const uint64_t hash = LongWords::hash(word, bytes);
    uint32_t count = 0;
    if (const int32_t* ids = worker.long_words.find(word, bytes, hash, count)) {
        std::copy(ids, ids + count, out);
    } else {
        count = merge(word, size, out, worker);
        if (bytes <= ShortWords::kBytes && count <= ShortWords::kIds) {
            const ShortWords::Key key = ShortWords::key(word, bytes, limit);
            worker.short_words.add(key, ShortWords::place(key), out, count);
        } else {
            worker.long_words.add(word, bytes, hash, out, count);
        }
    }
    worker.count += count;
}

template <class Split>
void Encoder::encode_words(const uint8_t* p, const uint8_t* end, const uint8_t* limit, Worker& worker) const {
    while (p < end) {
        const uint8_t* q = Split::next(p, end);
        const uint64_t size = q - p;
        worker.reserve(size + ShortWords::kIds);  // no more ids than bytes, and three are always copied
        if (size <= ShortWords::kBytes) {
            const ShortWords::Key key = ShortWords::key(p, static_cast<uint32_t>(size), limit);
            if (const ShortWords::Slot* slot = worker.short_words.find(key, ShortWords::place(key))) {
                std::memcpy(worker.ids.get() + worker.count, slot->ids, sizeof(slot->ids));
                worker.count += slot->count;
                p = q;
                continue;
            }
        }
        encode_unknown(p, size, limit, worker);
        p = q;
    }
}

void Encoder::encode_piece(const uint8_t* p, const uint8_t* end, const uint8_t* limit, Worker& worker) const {
    with_pattern(pattern_, [&](auto split) { encode_words<decltype(split)>(p, end, limit, worker); });
}

// False if the text has to be normalised first; then nothing was added to the worker's ids.
bool Encoder::encode_text(const Text& text, Worker& worker) const {
    const uint8_t *begin = text.data, *end = begin + text.size;
    if (normal_form_ && !surely_normal(begin, text.size)) return false;
    if (raw_.empty() && normalized_.empty()) {
        encode_piece(begin, end, end, worker);
        return true;
    }
    const auto add = [&worker](int32_t id) {
        worker.reserve(1);
        worker.ids[worker.count++] = id;
    };
    worker.pieces.clear();
    raw_.split(begin, end, worker.pieces);
    for (const Piece& piece : worker.pieces) {
        if (piece.id >= 0) {
            add(piece.id);
            continue;
        }
        worker.inner.clear();
        normalized_.split(piece.begin, piece.end, worker.inner);
        for (const Piece& part : worker.inner) {
            if (part.id >= 0) add(part.id);
            else encode_piece(part.begin, part.end, end, worker);
        }
    }
    return true;
}

Encoded Encoder::encode(const Text* texts, int64_t count, int32_t end_id, int threads, int64_t* lengths) {
    Encoded encoded;
    uint64_t share = kShare;
    for (int64_t i = 0; i < count; ++i) {
        if (texts[i].size >= kLongestText)
            throw std::invalid_argument("text " + std::to_string(i) + " is longer than 2 GiB");
        if (share >= kShare) encoded.first.push_back(i), share = 0;
        share += texts[i].size;
    }
    encoded.parts.resize(encoded.first.size());
    const int64_t parts = static_cast<int64_t>(encoded.parts.size());
    parallel_ranges(parts, 1, threads, [&](int64_t part, int64_t) {
        std::unique_ptr<Worker> worker = take();
        worker->count = 0;
        const int64_t last = part + 1 < parts ? encoded.first[part + 1] : count;
        for (int64_t i = encoded.first[part]; i < last; ++i) {
            const int64_t bad = invalid_utf8(texts[i].data, texts[i].size);
            if (bad >= 0)
                throw std::invalid_argument("text " + std::to_string(i) + " is not UTF-8 at byte " + std::to_string(bad));
            const uint64_t before = worker->count;
            const bool done = encode_text(texts[i], *worker);
            if (done && end_id >= 0) {
                worker->reserve(1);
                worker->ids[worker->count++] = end_id;
            }
            lengths[i] = done ? static_cast<int64_t>(worker->count - before) : -1;
        }
        encoded.parts[part].assign(worker->ids.get(), worker->ids.get() + worker->count);
        give_back(std::move(worker));
    });
    for (const auto& part : encoded.parts) encoded.total += static_cast<int64_t>(part.size());
    return encoded;
}

std::vector<int64_t> Encoder::words(Text text) const {
    std::vector<int64_t> ends;
    const uint8_t *p = text.data, *end = p + text.size;
    with_pattern(pattern_, [&](auto split) {
        while (p < end) ends.push_back((p = decltype(split)::next(p, end)) - text.data);
    });
    return ends;
}

std::unique_ptr<Worker> Encoder::take() {
    {
        const std::lock_guard<std::mutex> hold(guard_);
        if (!idle_.empty()) {
            std::unique_ptr<Worker> worker = std::move(idle_.back());
            idle_.pop_back();
            return worker;
        }
    }
    return std::make_unique<Worker>();
}

void Encoder::give_back(std::unique_ptr<Worker> worker) {
    const std::lock_guard<std::mutex> hold(guard_);
    idle_.push_back(std::move(worker));
}

}  // namespace mainspring
