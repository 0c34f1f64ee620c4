#include "format.hpp"

#include <limits>
#include <stdexcept>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the .bin/.idx format is little-endian, and so is this reader"
#endif

namespace mainspring {
namespace {

constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};
constexpr uint64_t kHeader = 34;

[[noreturn]] void bad(const std::string& problem) { throw std::invalid_argument(problem); }

template <class T>
void append(std::string& out, T value) {
    out.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

// Pointers must be the running sum of the sizes: a flipped bit in either shows here.
int64_t check_sequences(const char* data, const Layout& layout) {
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

void check_documents(const char* data, const Layout& layout) {
    const Unaligned<int64_t> documents{data + layout.documents_at};
    if (layout.document_indices == 0 || documents[0] != 0) bad("its document list does not begin with 0");
    for (int64_t i = 1; i < layout.document_indices; ++i)
        if (documents[i] < documents[i - 1])
            bad("its document list goes backwards at entry " + std::to_string(i));
    const int64_t last = documents[layout.document_indices - 1];
    if (last != layout.sequences)
        bad("its document list ends at " + std::to_string(last) + ", but it has " +
            std::to_string(layout.sequences) + " sequences");
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

Layout parse_index(const char* data, uint64_t length) {
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
    layout.tokens = check_sequences(data, layout);
    check_documents(data, layout);
    return layout;
}

std::string index_bytes(Unaligned<int32_t> sizes, int64_t count, int dtype_code) {
    const int64_t item = item_size(dtype_code);
    if (item == 0) bad("dtype code " + std::to_string(dtype_code) + " is no integer type");
    std::string out;
    out.reserve(kHeader + 20 * static_cast<uint64_t>(count) + 8);
    out.append(kMagic, sizeof(kMagic));
    append<uint64_t>(out, 1);
    append<uint8_t>(out, static_cast<uint8_t>(dtype_code));
    append<uint64_t>(out, static_cast<uint64_t>(count));
    append<uint64_t>(out, static_cast<uint64_t>(count) + 1);
    out.append(sizes.at, static_cast<size_t>(count) * 4);
    int64_t pointer = 0;
    for (int64_t i = 0; i < count; ++i) {
        append<int64_t>(out, pointer);
        if (sizes[i] < 0) bad("document " + std::to_string(i) + " has a negative length");
        pointer += sizes[i] * item;
    }
    for (int64_t i = 0; i <= count; ++i) append<int64_t>(out, i);
    return out;
}

}  // namespace mainspring
