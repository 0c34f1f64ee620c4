#include "gather.hpp"

#include <algorithm>
#include <limits>
#include <mutex>
#include <stdexcept>

#include "clones.hpp"
#include "parallel.hpp"

namespace mainspring {
namespace {

constexpr Range kNothing{std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()};

Range join(Range a, Range b) { return {std::min(a.low, b.low), std::max(a.high, b.high)}; }

// Smallest and largest are found in the file's own type, where a vector holds the most of them.
template <class T>
[[gnu::always_inline]] inline Range widen_as(const char* from, int64_t count, int64_t* to) {
    const Unaligned<T> source{from};
    T low = std::numeric_limits<T>::max(), high = std::numeric_limits<T>::min();
    for (int64_t i = 0; i < count; ++i) {
        const T token = source[i];
        low = std::min(low, token);
        high = std::max(high, token);
        to[i] = static_cast<int64_t>(token);
    }
    return {static_cast<int64_t>(low), static_cast<int64_t>(high)};
}

MAINSPRING_CLONES
Range widen_u16(const char* from, int64_t count, int64_t* to) { return widen_as<uint16_t>(from, count, to); }
MAINSPRING_CLONES
Range widen_i32(const char* from, int64_t count, int64_t* to) { return widen_as<int32_t>(from, count, to); }

Range widen(int dtype_code, const char* from, int64_t count, int64_t* to) {
    if (count == 0) return kNothing;
    switch (dtype_code) {
        case 1: return widen_as<uint8_t>(from, count, to);
        case 2: return widen_as<int8_t>(from, count, to);
        case 3: return widen_as<int16_t>(from, count, to);
        case 4: return widen_i32(from, count, to);
        case 5: return widen_as<int64_t>(from, count, to);
        case 8: return widen_u16(from, count, to);
        default: throw std::invalid_argument("unknown dtype code");
    }
}

// Which .bin files were seen to be whole: one look at each for a call, not for a document.
class Whole {
   public:
    explicit Whole(const Corpus& corpus) : corpus_(corpus), seen_(corpus.shards().size(), 0) {}

    void check(const Shard* shard) {
        char& seen = seen_[static_cast<size_t>(shard - corpus_.shards().data())];
        if (seen) return;
        const int64_t readable = shard->bin->readable();
        if (readable < shard->bin->bytes()) throw Truncated(shard->bin->path(), readable);
        seen = 1;
    }

   private:
    const Corpus& corpus_;
    std::vector<char> seen_;
};

// `length` tokens and the one after them, from where the walk stands.
template <class Walk>
Range copy(const Corpus& corpus, Walk walk, int64_t length, int64_t out, const Batch& batch, Whole& whole) {
    const int code = corpus.dtype_code();
    const int64_t item = item_size(code);
    int64_t *tokens = batch.tokens + out, *labels = batch.labels + out, offset = walk.offset(), last = 0;
    Range seen = kNothing;
    for (int64_t done = 0; done <= length; offset = 0) {
        const Document document = walk.next();
        const Shard& shard = *document.shard;
        const int64_t take = std::min(document.size - offset, length + 1 - done);
        const int64_t pointer = shard.pointers[document.number];
        // Compared by parts: what an unchecked index says must not overflow.
        if (take < 1 || pointer < 0 || pointer > shard.bin->bytes() ||
            (offset + take) * item > shard.bin->bytes() - pointer)
            throw std::out_of_range("a document leaves the .bin");
        whole.check(document.shard);
        const char* from = shard.bin->data() + pointer + offset * item;
        const int64_t inside = std::min(take, length - done);  // the last of length + 1 is only a label
        seen = join(seen, widen(code, from, inside, tokens + done));
        if (inside < take) seen = join(seen, widen(code, from + inside * item, 1, &last));
        done += take;
    }
    std::copy(tokens + 1, tokens + length, labels);
    labels[length - 1] = last;
    return seen;
}

void check_place(int64_t length, int64_t out, const Batch& batch) {
    if (length < 1 || out < 0 || length > batch.capacity || out > batch.capacity - length)
        throw std::out_of_range("a piece does not fit its batch");
}

int64_t range_of(int64_t count, const Batch& batch) { return batch.threads == 1 ? count : 1; }

}  // namespace

std::vector<Range> gather_blocks(const std::vector<const SampleOrder*>& sources, const int64_t* pieces, int64_t count,
                                 const Batch& batch) {
    for (const SampleOrder* source : sources) source->corpus().check_indices();
    std::vector<Range> all(sources.size(), kNothing);
    std::mutex guard;
    parallel_ranges(count, range_of(count, batch), batch.threads, [&](int64_t first, int64_t last) {
        std::vector<Whole> whole;
        for (const SampleOrder* source : sources) whole.emplace_back(source->corpus());
        for (int64_t p = first; p < last; ++p) {
            const int64_t *piece = pieces + 5 * p, source = piece[0], turn = piece[1], offset = piece[2];
            const int64_t length = piece[3], out = piece[4];
            if (source < 0 || source >= static_cast<int64_t>(sources.size()))
                throw std::out_of_range("a piece names no source");
            const SampleOrder& order = *sources[static_cast<size_t>(source)];
            check_place(length, out, batch);
            if (turn < 0 || offset < 0 || length > order.seq_length() || offset > order.seq_length() - length)
                throw std::out_of_range("a piece leaves its block");
            const auto epoch = order.epoch(turn / order.blocks(), batch.threads);
            const int64_t block = epoch->blocks(turn % order.blocks());
            const SampleOrder::Walk walk(order, *epoch, block * order.seq_length() + offset);
            const Range seen = copy(order.corpus(), walk, length, out, batch, whole[static_cast<size_t>(source)]);
            const std::lock_guard<std::mutex> hold(guard);
            Range& known = all[static_cast<size_t>(source)];
            known = join(known, seen);
        }
    });
    return all;
}

Range gather_rows(const Corpus& corpus, const int64_t* pieces, int64_t count, const Batch& batch) {
    corpus.check_indices();
    Range all = kNothing;
    std::mutex guard;
    parallel_ranges(count, range_of(count, batch), batch.threads, [&](int64_t first, int64_t last) {
        Whole whole(corpus);
        for (int64_t p = first; p < last; ++p) {
            const int64_t *piece = pieces + 3 * p, length = piece[1], out = piece[2];
            check_place(length, out, batch);
            const Range seen = copy(corpus, FileWalk(corpus, piece[0]), length, out, batch, whole);
            const std::lock_guard<std::mutex> hold(guard);
            all = join(all, seen);
        }
    });
    return all;
}

}  // namespace mainspring
