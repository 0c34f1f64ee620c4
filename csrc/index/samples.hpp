// The order of a dataset's blocks, epoch after epoch, without an array as long as the dataset: all in 64-bit integers,
// no floating point, so that every platform gives the same order.
//
// The N documents are in G = ceil(N / 512) groups; group g has the documents g, g + G, g + 2 G, ..., so that each
// samples the whole dataset. An epoch lays the groups in a keyed order in one row of tokens, the documents of each group
// in a keyed order too, and cuts the row every `seq_length` tokens; the blocks come in a third keyed order. A block is
// found by a search in the running sum of the groups' tokens, the only array, and a walk of at most 512 documents.
#pragma once

#include <array>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "corpus.hpp"
#include "random.hpp"

namespace mainspring {

constexpr int64_t kGroup = 512;  // documents of a group, at most: changing it changes the order

inline int64_t group_count(int64_t documents) { return (documents + kGroup - 1) / kGroup; }

// totals[g] = tokens of group g, in one pass over all lengths.
void group_tokens(const Corpus& corpus, int64_t* totals, int threads);

// The purposes of an epoch's streams of random numbers.
enum : uint64_t { kGroups = 0, kDocuments = 1, kBlocks = 2 };

struct Epoch {
    Permutation groups, blocks;
    uint64_t documents_key;
    std::vector<int64_t> before;  // [G + 1]: tokens before each place of the order of groups, and all of them
};

// A place in the row of an epoch, or in the files' own order: documents one after another. next() gives the next
// document that has tokens; std::out_of_range past the last.
struct Document {
    const Shard* shard;
    int64_t number;  // in its shard
    int64_t size;    // tokens, at least 1
};

class SampleOrder {
   public:
    // totals: [G], of group_tokens; they must outlive the order. std::invalid_argument when they are not the corpus's,
    // or when it has not one block of seq_length + 1 tokens.
    SampleOrder(std::shared_ptr<const Corpus> corpus, const int64_t* totals, int64_t groups, int64_t seq_length,
                uint64_t seed);

    const Corpus& corpus() const { return *corpus_; }
    int64_t seq_length() const { return seq_length_; }
    int64_t blocks() const { return blocks_; }

    // Epochs are made when first asked for; the last few are kept. Safe to call from several threads.
    std::shared_ptr<const Epoch> epoch(int64_t number, int threads) const;

    // The documents of an epoch's row from a token on.
    class Walk {
       public:
        // The document that holds `token` of the row comes first; offset() says where in it the token is.
        Walk(const SampleOrder& order, const Epoch& epoch, int64_t token);
        int64_t offset() const { return offset_; }
        Document next();

       private:
        void enter(int64_t place);
        Document at(int64_t row) const;

        const SampleOrder& order_;
        const Epoch& epoch_;
        int64_t place_ = 0, group_ = 0, offset_ = 0;
        int members_ = 0, done_ = 0;
        std::array<uint16_t, kGroup> rows_;
    };

   private:
    std::shared_ptr<Epoch> make(int64_t number, int threads) const;

    std::shared_ptr<const Corpus> corpus_;
    const int64_t* totals_;
    int64_t groups_, seq_length_, blocks_;
    uint64_t seed_;
    std::array<size_t, kGroup + 1> row_shard_;  // the shard that holds document row * G, to look no further
    mutable std::mutex guard_;
    mutable std::list<std::pair<int64_t, std::shared_ptr<const Epoch>>> held_;
};

// The documents in the order of the files, from a token on.
class FileWalk {
   public:
    FileWalk(const Corpus& corpus, int64_t token);
    int64_t offset() const { return offset_; }
    Document next();

   private:
    const Corpus& corpus_;
    size_t shard_;
    int64_t document_, offset_;
};

}  // namespace mainspring
