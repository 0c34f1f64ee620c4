#include "samples.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "clones.hpp"
#include "parallel.hpp"

namespace mainspring {
namespace {

constexpr size_t kEpochsHeld = 3;  // a step may straddle two epochs while the next one is read ahead

MAINSPRING_CLONES
void add_sizes(const char* sizes_at, int64_t first, int64_t count, int64_t* totals) {
    const Unaligned<int32_t> sizes{sizes_at};
    for (int64_t i = 0; i < count; ++i) totals[i] += sizes[first + i];
}

// Adds the sizes of documents [first, first + count), which are one group after another, to totals.
void add_row(const Corpus& corpus, int64_t first, int64_t count, int64_t* totals) {
    for (size_t s = corpus.shard_of(first); count > 0; ++s) {
        const Shard& shard = corpus.shards()[s];
        const int64_t inside = first - shard.first_document, take = std::min(count, shard.documents - inside);
        add_sizes(shard.sizes.at, inside, take, totals);
        first += take;
        totals += take;
        count -= take;
    }
}

}  // namespace

void group_tokens(const Corpus& corpus, int64_t* totals, int threads) {
    const int64_t documents = corpus.documents(), groups = group_count(documents);
    if (groups == 0) return;
    std::fill(totals, totals + groups, int64_t{0});
    const int64_t rows = (documents + groups - 1) / groups, workers = threads > 0 ? threads : available_cores();
    std::mutex guard;
    // Row r holds documents [r G, (r + 1) G): a thread's rows are one stretch of the file, read from front to back.
    parallel_ranges(rows, (rows + workers - 1) / workers, threads, [&](int64_t first, int64_t last) {
        std::vector<int64_t> own(static_cast<size_t>(groups), 0);
        for (int64_t row = first; row < last; ++row)
            add_row(corpus, row * groups, std::min(groups, documents - row * groups), own.data());
        const std::lock_guard<std::mutex> hold(guard);
        for (int64_t g = 0; g < groups; ++g) totals[g] += own[static_cast<size_t>(g)];
    });
}

SampleOrder::SampleOrder(std::shared_ptr<const Corpus> corpus, const int64_t* totals, int64_t groups,
                         int64_t seq_length, uint64_t seed)
    : corpus_(std::move(corpus)), totals_(totals), groups_(groups), seq_length_(seq_length),
      blocks_(seq_length > 0 ? (corpus_->tokens() - 1) / seq_length : 0), seed_(seed) {
    if (seq_length < 1 || blocks_ < 1) throw std::invalid_argument("not one block of seq_length + 1 tokens");
    if (groups != group_count(corpus_->documents()) ||
        std::accumulate(totals, totals + groups, int64_t{0}) != corpus_->tokens() ||
        std::any_of(totals, totals + groups, [](int64_t total) { return total < 0; }))
        throw std::invalid_argument("the groups' totals are not the corpus's");
    for (int64_t row = 0; row <= kGroup; ++row)
        row_shard_[static_cast<size_t>(row)] =
            corpus_->shard_of(std::min(row * groups, std::max<int64_t>(0, corpus_->documents() - 1)));
}

std::shared_ptr<Epoch> SampleOrder::make(int64_t number, int threads) const {
    const auto word = static_cast<uint64_t>(number);
    auto epoch = std::make_shared<Epoch>(Epoch{Permutation(stream_key(seed_, word, kGroups), groups_),
                                               Permutation(stream_key(seed_, word, kBlocks), blocks_),
                                               stream_key(seed_, word, kDocuments),
                                               std::vector<int64_t>(static_cast<size_t>(groups_) + 1)});
    int64_t* before = epoch->before.data();
    parallel_ranges(groups_, 1 << 14, threads, [&](int64_t first, int64_t last) {
        for (int64_t place = first; place < last; ++place) before[place + 1] = totals_[epoch->groups(place)];
    });
    for (int64_t place = 0; place < groups_; ++place) before[place + 1] += before[place];
    return epoch;
}

std::shared_ptr<const Epoch> SampleOrder::epoch(int64_t number, int threads) const {
    const std::lock_guard<std::mutex> hold(guard_);
    const auto found = std::find_if(held_.begin(), held_.end(), [&](const auto& one) { return one.first == number; });
    if (found != held_.end())
        held_.splice(held_.begin(), held_, found);
    else
        held_.emplace_front(number, make(number, threads));
    if (held_.size() > kEpochsHeld) held_.pop_back();
    return held_.front().second;
}

// ---- the walks ------------------------------------------------------------------------------------------------------

SampleOrder::Walk::Walk(const SampleOrder& order, const Epoch& epoch, int64_t token) : order_(order), epoch_(epoch) {
    const std::vector<int64_t>& before = epoch.before;
    if (token < 0 || token >= before.back()) throw std::out_of_range("a sample begins past the last token");
    place_ = std::upper_bound(before.begin(), before.end(), token) - before.begin() - 1;
    enter(place_);
    offset_ = token - before[static_cast<size_t>(place_)];
    for (; done_ < members_; ++done_) {
        const int64_t size = at(rows_[static_cast<size_t>(done_)]).size;
        if (offset_ < size) return;
        offset_ -= size;
    }
    throw std::out_of_range("a group of documents is shorter than its total");
}

void SampleOrder::Walk::enter(int64_t place) {
    place_ = place;
    group_ = epoch_.groups(place);
    members_ = static_cast<int>((order_.corpus_->documents() - group_ + order_.groups_ - 1) / order_.groups_);
    done_ = 0;
    shuffle(subkey(epoch_.documents_key, static_cast<uint64_t>(group_)), members_, rows_.data());
}

Document SampleOrder::Walk::at(int64_t row) const {
    const int64_t document = row * order_.groups_ + group_;
    const auto which = static_cast<size_t>(row);
    const std::vector<Shard>& shards = order_.corpus_->shards();
    const Shard* shard = shards.data();
    if (shards.size() > 1)
        shard += order_.corpus_->shard_of(document, order_.row_shard_[which], order_.row_shard_[which + 1]);
    const int64_t number = document - shard->first_document;
    return {shard, number, shard->sizes[number]};
}

Document SampleOrder::Walk::next() {
    while (true) {
        if (done_ == members_) {
            if (place_ + 1 >= order_.groups_) throw std::out_of_range("a sample reaches past the last token");
            enter(place_ + 1);
        }
        const Document document = at(rows_[static_cast<size_t>(done_++)]);
        if (document.size > 0) return document;
    }
}

FileWalk::FileWalk(const Corpus& corpus, int64_t token) : corpus_(corpus) {
    if (token < 0 || token >= corpus.tokens()) throw std::out_of_range("a row begins past the last token");
    const std::vector<Shard>& shards = corpus.shards();
    const auto behind = std::upper_bound(shards.begin(), shards.end(), token,
                                         [](int64_t value, const Shard& shard) { return value < shard.first_token; });
    shard_ = static_cast<size_t>(behind - shards.begin()) - 1;
    const Shard& shard = shards[shard_];
    const int64_t inside = token - shard.first_token, byte = inside * item_size(corpus.dtype_code());
    int64_t low = 0, high = shard.documents - 1;  // the last document whose pointer is not behind the byte
    while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        if (shard.pointers[middle] <= byte)
            low = middle;
        else
            high = middle - 1;
    }
    document_ = low;
    offset_ = inside - shard.pointers[low] / item_size(corpus.dtype_code());
}

Document FileWalk::next() {
    const std::vector<Shard>& shards = corpus_.shards();
    for (; shard_ < shards.size(); ++shard_, document_ = 0) {
        const Shard& shard = shards[shard_];
        while (document_ < shard.documents) {
            const int64_t number = document_++;
            if (const int64_t size = shard.sizes[number]; size > 0) return {&shard, number, size};
        }
    }
    throw std::out_of_range("a row reaches past the last token");
}

}  // namespace mainspring
