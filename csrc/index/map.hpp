// A file mapped for reading, with the identity it had when it was opened. It keeps no descriptor, so a thousand shards
// do not meet the limit of open files.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

namespace mainspring {

// What changes when a file is written, replaced or copied; the times are nanoseconds since 1970.
struct Identity {
    uint64_t device, inode;
    int64_t bytes, modified, changed;
    bool operator==(const Identity& other) const {
        return device == other.device && inode == other.inode && bytes == other.bytes && modified == other.modified &&
               changed == other.changed;
    }
};

class Map {
   public:
    explicit Map(const std::string& path);  // std::system_error
    ~Map();
    Map(const Map&) = delete;
    Map& operator=(const Map&) = delete;

    const std::string& path() const { return path_; }
    const char* data() const { return data_; }
    int64_t bytes() const { return identity_.bytes; }
    const Identity& identity() const { return identity_; }

    // Is the file at the path still this one, unchanged?
    bool unchanged() const;
    // Bytes that may be read: fewer than bytes() once the file was truncated in place, where reading on would kill the
    // process. A file that was replaced is another one; this mapping keeps the old.
    int64_t readable() const;

   private:
    std::string path_;
    const char* data_;
    Identity identity_;
};

}  // namespace mainspring
