#include "file.hpp"

#include <cstring>

#include "hash.hpp"
#include "runs.hpp"

namespace mainspring {

namespace {

constexpr char MAGIC[9] = "msdedup1";  // the digit is the version of the format
constexpr uint64_t HEADER_SEED = 1;
constexpr uint64_t MOST = uint64_t{1} << 40;  // of any count: products of two of them with small numbers fit 64 bits

}  // namespace

uint64_t file_bytes(const Header& h) {
    if (h.records > MOST || h.rows > MOST || h.permutations > 65536 || h.sections > 65536)
        throw std::length_error("counts out of range");
    const uint64_t section = h.key_words == 2 ? section_bytes<2>(h.records) : section_bytes<1>(h.records);
    return HEADER_BYTES + h.sections * section + (h.permutations ? h.rows * row_bytes(h) : 0);
}

void put_header(char* out, const Header& h) {
    uint64_t words[10] = {0,      h.key_words,    h.sections, h.records,     h.rows,
                          h.permutations, h.settings, 0, file_bytes(h), 0};
    std::memcpy(words, MAGIC, 8);
    words[9] = hash_bytes(words, 72, HEADER_SEED);
    std::memcpy(out, words, HEADER_BYTES);
}

InputFile::InputFile(std::string path) : path_(std::move(path)), stream_(path_, std::ios::binary | std::ios::ate) {
    if (!stream_) throw FileError(path_, "cannot be opened");
    const auto size = static_cast<uint64_t>(stream_.tellg());
    uint64_t words[10];
    if (size < HEADER_BYTES) damaged("has " + std::to_string(size) + " bytes, less than its header");
    read(0, HEADER_BYTES, words);
    if (std::memcmp(words, MAGIC, 8) != 0) damaged("does not begin as a file of fingerprints");
    if (words[9] != hash_bytes(words, 72, HEADER_SEED)) damaged("has a damaged header");
    header_ = {words[1], words[2], words[3], words[4], words[5], words[6]};
    if (header_.key_words < 1 || header_.key_words > 2) damaged("has a damaged header");
    if (size != words[8])
        damaged("has " + std::to_string(size) + " bytes, its header says " + std::to_string(words[8]));
    if (file_bytes(header_) != size) damaged("has a damaged header");
}

void InputFile::read(uint64_t at, uint64_t size, void* out) {
    stream_.seekg(static_cast<std::streamoff>(at));
    stream_.read(static_cast<char*>(out), static_cast<std::streamsize>(size));
    if (!stream_) damaged("ends early, or cannot be read");
}

void InputFile::damaged(const std::string& what) const { throw FileError(path_, what); }

}  // namespace mainspring
