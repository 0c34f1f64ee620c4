// The documents of one or more .bin/.idx pairs, numbered through from the first pair to the last.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "format.hpp"
#include "map.hpp"

namespace mainspring {

struct Shard {
    std::shared_ptr<const Map> idx, bin;
    Unaligned<int32_t> sizes;
    Unaligned<int64_t> pointers;
    int64_t documents, tokens;
    int64_t first_document, first_token;  // in the whole corpus
};

struct Pair {
    std::shared_ptr<const Map> idx, bin;
    int64_t tokens;  // what check_tables found
};

// A file that was truncated after it was opened.
struct Truncated : std::runtime_error {
    Truncated(std::string path, int64_t bytes)
        : std::runtime_error(path + ": truncated"), path(std::move(path)), bytes(bytes) {}
    std::string path;
    int64_t bytes;
};

class Corpus {
   public:
    // std::invalid_argument for a header that does not fit its file, a .bin of another size, or two types of token.
    explicit Corpus(const std::vector<Pair>& pairs);

    const std::vector<Shard>& shards() const { return shards_; }
    int64_t documents() const { return documents_; }
    int64_t tokens() const { return tokens_; }
    int dtype_code() const { return dtype_code_; }

    // Truncated when an .idx shrank, where going on would kill the process. One call looks at some shards, the next at
    // the others: a cluster's file system may take its time for each.
    void check_indices() const;

    // The shard that holds a document, looked for in shards [low, high] only.
    size_t shard_of(int64_t document, size_t low, size_t high) const;
    size_t shard_of(int64_t document) const { return shard_of(document, 0, shards_.size() - 1); }

   private:
    std::vector<Shard> shards_;
    int64_t documents_ = 0, tokens_ = 0;
    int dtype_code_ = 0;
    mutable std::atomic<size_t> looked_{0};
};

}  // namespace mainspring
