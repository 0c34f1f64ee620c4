// Files of this room: a header with everything that decides where things lie, read back with checks.
#pragma once

#include <cstdint>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace mainspring {

// A file that is not what it should be. what() is the problem alone; the file stands beside it.
struct FileError : std::runtime_error {
    FileError(std::string file, const std::string& problem) : std::runtime_error(problem), path(std::move(file)) {}
    std::string path;
};

struct Header {
    uint64_t key_words;     // 64-bit words of a record's key: 2 digests, 1 band keys
    uint64_t sections;      // one a band; 1 for digests
    uint64_t records;       // in each section
    uint64_t rows;          // signatures after the sections, one a document
    uint64_t permutations;  // bytes in a row, besides 2 for each section and a checksum; 0 without rows
    uint64_t settings;      // what two files must have in common to be compared
};

constexpr uint64_t HEADER_BYTES = 80;

// Bytes of a row of signatures.
inline uint64_t row_bytes(const Header& header) { return header.permutations + 2 * header.sections + 4; }

// Where a file of so many bytes is to be written. Files are little-endian, as all machines this runs on.
using Allocate = std::function<char*(uint64_t bytes)>;

// Writes the 80 bytes of the header.
void put_header(char* out, const Header& header);

// Bytes of the whole file with this header; throws std::length_error where 64 bits do not hold them.
uint64_t file_bytes(const Header& header);

// A file opened, its header checked: checksum, and the size that follows from it.
class InputFile {
   public:
    explicit InputFile(std::string path);
    // Exactly `size` bytes from `at` on, else a FileError.
    void read(uint64_t at, uint64_t size, void* out);
    [[noreturn]] void damaged(const std::string& what) const;
    const Header& header() const { return header_; }
    const std::string& path() const { return path_; }

   private:
    std::string path_;
    std::ifstream stream_;
    Header header_{};
};

}  // namespace mainspring
