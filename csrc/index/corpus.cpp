#include "corpus.hpp"

#include <algorithm>

namespace mainspring {
namespace {

constexpr size_t kLooks = 16;  // shards of one look: about as many microseconds on a local disk

}  // namespace

Corpus::Corpus(const std::vector<Pair>& pairs) {
    if (pairs.empty()) throw std::invalid_argument("a corpus has at least one pair of files");
    for (const Pair& pair : pairs) {
        const char* data = pair.idx->data();
        const Layout layout = read_header(data, static_cast<uint64_t>(pair.idx->bytes()));
        if (!shards_.empty() && layout.dtype_code != dtype_code_)
            throw std::invalid_argument(pair.idx->path() + " has another type of token than the pairs before it");
        dtype_code_ = layout.dtype_code;
        const int item = item_size(dtype_code_);
        if (pair.tokens < 0 || pair.bin->bytes() % item != 0 || pair.bin->bytes() / item != pair.tokens)
            throw std::invalid_argument(pair.bin->path() + " has another size than its index says");
        shards_.push_back({pair.idx, pair.bin, {data + layout.sizes_at}, {data + layout.pointers_at}, layout.sequences,
                           pair.tokens, documents_, tokens_});
        documents_ += layout.sequences;
        tokens_ += pair.tokens;
    }
}

void Corpus::check_indices() const {
    const size_t looks = std::min(kLooks, shards_.size()), first = looked_.fetch_add(looks);
    for (size_t i = first; i < first + looks; ++i) {
        const Map& idx = *shards_[i % shards_.size()].idx;
        if (const int64_t readable = idx.readable(); readable < idx.bytes()) throw Truncated(idx.path(), readable);
    }
}

size_t Corpus::shard_of(int64_t document, size_t low, size_t high) const {
    while (low < high) {  // the last shard that begins at the document or before it
        const size_t middle = low + (high - low + 1) / 2;
        if (shards_[middle].first_document <= document)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

}  // namespace mainspring
