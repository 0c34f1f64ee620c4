#include "format.hpp"

#include <atomic>
#include <limits>
#include <stdexcept>

#include "clones.hpp"
#include "parallel.hpp"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the .bin/.idx format is little-endian, and so is this reader"
#endif

namespace mainspring {
namespace {

constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};
constexpr uint64_t kHeader = 34;

[[noreturn]] void bad(const std::string& problem) { throw std::invalid_argument(problem); }

constexpr int64_t kRange = 1 << 18;

// Pointers must be the running sum of the sizes: a flipped bit in either shows here.
int64_t describe_sequences(const char* data, const Layout& layout) {
    const Unaligned<int32_t> sizes{data + layout.sizes_at};
    const Unaligned<int64_t> pointers{data + layout.pointers_at};
    const int64_t item = item_size(layout.dtype_code);
    int64_t tokens = 0;
    for (int64_t i = 0; i < layout.sequences; ++i) {
        if (sizes[i] < 0) bad("document " + std::to_string(i) + " has the negative length " + std::to_string(sizes[i]));
        if (pointers[i] != tokens * item)
            bad("document " + std::to_string(i) + " points to byte " + std::to_string(pointers[i]) +
                ", but the lengths before it put it at byte " + std::to_string(tokens * item));
        if (tokens > std::numeric_limits<int64_t>::max() / 16 - sizes[i]) bad("the lengths overflow 64 bits");
        tokens += sizes[i];
    }
    return tokens;
}

void describe_documents(const char* data, const Layout& layout) {
    const Unaligned<int64_t> documents{data + layout.documents_at};
    for (int64_t i = 1; i < layout.document_indices; ++i)
        if (documents[i] < documents[i - 1])
            bad("its document list goes backwards at entry " + std::to_string(i));
}

// Entries [first, last) of the two tables, each pointer held against the one before it: no running sum, so ranges can be
// checked side by side, and the compiler can do several entries at once. Non-zero when anything is wrong.
MAINSPRING_CLONES
uint64_t wrong_sequences(const char* sizes_at, const char* pointers_at, int64_t first, int64_t last, int64_t item) {
    const Unaligned<int32_t> sizes{sizes_at};
    const Unaligned<int64_t> pointers{pointers_at};
    constexpr uint64_t kLargest = std::numeric_limits<int64_t>::max() / 16;
    uint64_t wrong = 0;
    for (int64_t i = first; i < last; ++i) {
        const auto before = static_cast<uint64_t>(pointers[i - 1]), here = static_cast<uint64_t>(pointers[i]);
        wrong |= (here - before) ^ static_cast<uint64_t>(static_cast<int64_t>(sizes[i - 1]) * item);
        wrong |= static_cast<uint64_t>(sizes[i] < 0) | static_cast<uint64_t>(here > kLargest);
    }
    return wrong;
}

MAINSPRING_CLONES
uint64_t wrong_documents(const char* documents_at, int64_t first, int64_t last) {
    const Unaligned<int64_t> documents{documents_at};
    uint64_t wrong = 0;
    for (int64_t i = first; i < last; ++i) wrong |= static_cast<uint64_t>(documents[i] < documents[i - 1]);
    return wrong;
}

}  // namespace

int item_size(int dtype_code) {
    switch (dtype_code) {
        case 1: case 2: return 1;
        case 3: case 8: return 2;
        case 4: return 4;
        case 5: return 8;
        default: return 0;
    }
}

Layout read_header(const char* data, uint64_t length) {
    if (length >= sizeof(kMagic) && std::memcmp(data, kMagic, sizeof(kMagic)) != 0)
        bad("not a Megatron index (it does not begin with MMIDIDX)");
    if (length < kHeader) bad("truncated: " + std::to_string(length) + " bytes, the header alone has 34");
    const uint64_t version = Unaligned<uint64_t>{data + 9}[0];
    if (version != 1) bad("index version " + std::to_string(version) + ", this reader knows version 1");

    Layout layout{};
    layout.dtype_code = static_cast<unsigned char>(data[17]);
    const uint64_t item = item_size(layout.dtype_code);
    if (item == 0)
        bad("dtype code " + std::to_string(layout.dtype_code) + " is no integer type, so these are no tokens");

    const uint64_t sequences = Unaligned<uint64_t>{data + 18}[0], documents = Unaligned<uint64_t>{data + 26}[0];
    const uint64_t body = length - kHeader;
    // Compare by division first: a corrupt count must not overflow the sum below.
    const bool fits = sequences <= body / 12 && documents <= body / 8 && sequences * 12 + documents * 8 <= body;
    if (!fits)
        bad("truncated: its header announces " + std::to_string(sequences) + " sequences and " +
            std::to_string(documents) + " document entries, more than its " + std::to_string(length) + " bytes hold");
    const uint64_t rest = body - sequences * 12 - documents * 8;
    if (rest != 0 && rest != sequences)  // multimodal files end with one byte of mode per sequence
        bad(std::to_string(rest) + " bytes too many after its last table");

    layout.sequences = static_cast<int64_t>(sequences);
    layout.document_indices = static_cast<int64_t>(documents);
    layout.sizes_at = kHeader;
    layout.pointers_at = layout.sizes_at + 4 * layout.sequences;
    layout.documents_at = layout.pointers_at + 8 * layout.sequences;
    return layout;
}

int64_t check_tables(const char* data, const Layout& layout, int threads) {
    const int64_t item = item_size(layout.dtype_code), count = layout.sequences;
    const char *sizes_at = data + layout.sizes_at, *pointers_at = data + layout.pointers_at;
    const Unaligned<int32_t> sizes{sizes_at};
    const Unaligned<int64_t> pointers{pointers_at};
    std::atomic<bool> wrong{count > 0 && (pointers[0] != 0 || sizes[0] < 0)};
    parallel_ranges(count - 1, kRange, threads, [&](int64_t first, int64_t last) {
        if (wrong_sequences(sizes_at, pointers_at, first + 1, last + 1, item) != 0) wrong = true;
    });
    // The slow check says which entry it is. What it returns is right even when the quick one was too strict.
    const int64_t tokens = wrong       ? describe_sequences(data, layout)
                           : count > 0 ? pointers[count - 1] / item + sizes[count - 1]
                                       : 0;

    const Unaligned<int64_t> documents{data + layout.documents_at};
    if (layout.document_indices == 0 || documents[0] != 0) bad("its document list does not begin with 0");
    std::atomic<bool> backwards{false};
    parallel_ranges(layout.document_indices - 1, kRange, threads, [&](int64_t first, int64_t last) {
        if (wrong_documents(data + layout.documents_at, first + 1, last + 1) != 0) backwards = true;
    });
    if (backwards) describe_documents(data, layout);
    const int64_t last = documents[layout.document_indices - 1];
    if (last != layout.sequences)
        bad("its document list ends at " + std::to_string(last) + ", but it has " +
            std::to_string(layout.sequences) + " sequences");
    return tokens;
}

}  // namespace mainspring
