#include "gather.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace mainspring {
namespace {

template <class T>
Range widen(const char* from, int64_t count, int64_t* to, Range seen) {
    const Unaligned<T> source{from};
    for (int64_t i = 0; i < count; ++i) {
        const int64_t token = static_cast<int64_t>(source[i]);
        to[i] = token;
        seen.low = std::min(seen.low, token);
        seen.high = std::max(seen.high, token);
    }
    return seen;
}

template <class T>
Range gather_as(const Corpus& corpus, const int64_t* pieces, int64_t count, int64_t* tokens, int64_t* labels,
                int64_t capacity) {
    constexpr int64_t item = sizeof(T);
    Range seen{std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()};
    for (int64_t p = 0; p < count; ++p, pieces += 4) {
        int64_t position = pieces[0], offset = pieces[1];
        const int64_t length = pieces[2], out = pieces[3];
        if (position < 0 || offset < 0 || length < 1 || out < 0 || out > capacity - length)
            throw std::out_of_range("a piece does not fit its batch");
        int64_t last = 0;
        for (int64_t done = 0; done <= length;) {
            if (position >= corpus.documents) throw std::out_of_range("a sample reaches past the last token");
            const int64_t document = corpus.order ? corpus.order[position] : position;
            if (document < 0 || document >= corpus.documents) throw std::out_of_range("no such document");
            const int64_t size = corpus.sizes[document];
            if (offset >= size) {
                offset -= size;
                ++position;
                continue;
            }
            const int64_t take = std::min(size - offset, length + 1 - done);
            const int64_t byte = corpus.pointers[document] + offset * item;
            if (byte < 0 || byte > corpus.bin_bytes - take * item) throw std::out_of_range("a document leaves the .bin");
            const int64_t inside = std::min(take, length - done);  // the last of length + 1 is only a label
            seen = widen<T>(corpus.bin + byte, inside, tokens + out + done, seen);
            if (inside < take) seen = widen<T>(corpus.bin + byte + inside * item, 1, &last, seen);
            done += take;
            offset += take;
        }
        std::copy(tokens + out + 1, tokens + out + length, labels + out);
        labels[out + length - 1] = last;
    }
    return seen;
}

}  // namespace

Range gather(const Corpus& corpus, const int64_t* pieces, int64_t count, int64_t* tokens, int64_t* labels,
             int64_t capacity) {
    switch (corpus.dtype_code) {
        case 1: return gather_as<uint8_t>(corpus, pieces, count, tokens, labels, capacity);
        case 2: return gather_as<int8_t>(corpus, pieces, count, tokens, labels, capacity);
        case 3: return gather_as<int16_t>(corpus, pieces, count, tokens, labels, capacity);
        case 4: return gather_as<int32_t>(corpus, pieces, count, tokens, labels, capacity);
        case 5: return gather_as<int64_t>(corpus, pieces, count, tokens, labels, capacity);
        case 8: return gather_as<uint16_t>(corpus, pieces, count, tokens, labels, capacity);
        default: throw std::invalid_argument("unknown dtype code");
    }
}

}  // namespace mainspring
