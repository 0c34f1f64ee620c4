// Megatron's `.idx` file: 9 bytes of magic, u64 version, u8 dtype code, u64 sequences, u64 document indices,
// then i32 sizes[sequences], i64 byte pointers[sequences], i64 document indices[...], and for multimodal data
// i8 modes[sequences]. All little-endian and, because the header has 34 bytes, unaligned.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

namespace mainspring {

// An array somewhere in a mapped file; memcpy keeps unaligned loads defined (it compiles to one mov).
template <class T>
struct Unaligned {
    const char* at;
    T operator[](int64_t i) const {
        T value;
        std::memcpy(&value, at + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
        return value;
    }
};

struct Layout {
    int dtype_code;
    int64_t sequences, document_indices;
    int64_t sizes_at, pointers_at, documents_at;  // byte offsets in the file
};

// Bytes of one token of Megatron's integer dtype codes (1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16), else 0.
int item_size(int dtype_code);

// Checks the header against the length of the file, reading nothing else: afterwards the tables lie inside.
// std::invalid_argument says what is wrong.
Layout read_header(const char* data, uint64_t length);

// Checks every entry of the tables and returns the number of tokens. std::invalid_argument names the first wrong entry,
// whatever the number of threads.
int64_t check_tables(const char* data, const Layout& layout, int threads);

}  // namespace mainspring
