// One pass over a document: what the rules of engine/data/cleaning_rules.py judge it by.
#pragma once

#include <cstdint>

#include "unicode.hpp"

namespace mainspring {

// What engine/data/cleaning_repair.py has to mend.
enum Mend : int64_t { CARRIAGE_RETURNS = 1, SURROGATES = 2, CONTROLS = 4, PAGE_BREAKS = 8, NOT_NFC = 16 };

// Counts of characters unless said otherwise. Words are what str.split() gives; lines what split("\n") gives, each
// stripped, the blank ones left out; paragraphs are runs of lines without a blank one between.
struct Statistics {
    int64_t characters = 0, letters = 0, digits = 0, spaces = 0, newlines = 0;
    int64_t replacements = 0;                    // U+FFFD
    int64_t hashes = 0, ellipses = 0;            // "#"; "..." and U+2026
    int64_t words = 0, alphabetic_words = 0;     // words; those of them with a letter
    int64_t longest_word = 0, longest_space = 0;
    int64_t schemes = 0;                         // "://", of a web address or not
    int64_t urls = 0, url_characters = 0;        // addresses: http(s)://… and www.…
    int64_t lines = 0, line_characters = 0;
    int64_t repeated_lines = 0, repeated_line_characters = 0;  // those that stood before
    int64_t paragraphs = 0, repeated_paragraphs = 0, repeated_paragraph_characters = 0;
    int64_t short_lines = 0;                     // lines of at most 30 characters
    int64_t bullet_lines = 0, ellipsis_lines = 0, ended_lines = 0;  // start with one; end with one; end a sentence
    int64_t mend = 0;                            // Mend
};

Statistics scan(const Text& text);

}  // namespace mainspring
