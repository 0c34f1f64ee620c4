// What is known of a code point, and a Python string as the arrays of code units that it is.
#pragma once

#include <cstdint>

namespace mainspring {

// The same bits stand in make_unicode_table.py.
enum Property : uint16_t {
    SPACE = 1,     // str.isspace
    LETTER = 2,    // str.isalnum and not str.isdecimal: the letters of all scripts, and ² and Ⅷ
    DIGIT = 4,     // str.isdecimal
    CONTROL = 8,   // shown by no editor: C0 but white space, DEL, C1, the byte order mark
    SUSPECT = 16,  // text without any of these is NFC
    SINGLE = 32,   // of a script written without spaces: a word by itself
    MARK = 64,     // combining, part of the word it stands in
};
constexpr int SCRIPTS = 14;  // 0: no letter; then make_unicode_table.py's SCRIPTS
constexpr uint32_t REPLACEMENT = 0xFFFD;

// Properties in the low byte, script in the high one, of all 0x110000 code points.
const uint16_t* unicode_properties();

// `size` characters of 1, 2 or 4 bytes (`width`), as CPython keeps a str; `ascii` where all are below 128.
struct Text {
    const void* data;
    int64_t size;
    int width;
    bool ascii;
};

// visit(const Char* data, int64_t size) with the width as a type.
template <class Visit>
auto with_width(const Text& text, const Visit& visit) {
    if (text.width == 1) return visit(static_cast<const uint8_t*>(text.data), text.size);
    if (text.width == 2) return visit(static_cast<const uint16_t*>(text.data), text.size);
    return visit(static_cast<const uint32_t*>(text.data), text.size);
}

}  // namespace mainspring
