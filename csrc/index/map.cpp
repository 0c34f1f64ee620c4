#include "map.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace mainspring {
namespace {

constexpr char kNothing[1] = {0};

Identity identity_of(const struct stat& found) {
#if defined(__APPLE__)
    const timespec modified = found.st_mtimespec, changed = found.st_ctimespec;
#else
    const timespec modified = found.st_mtim, changed = found.st_ctim;
#endif
    const auto nanoseconds = [](const timespec& t) { return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec; };
    return {static_cast<uint64_t>(found.st_dev), static_cast<uint64_t>(found.st_ino),
            static_cast<int64_t>(found.st_size), nanoseconds(modified), nanoseconds(changed)};
}

struct Descriptor {
    int number;
    ~Descriptor() {
        if (number >= 0) close(number);
    }
};

}  // namespace

Map::Map(const std::string& path) : path_(path), data_(kNothing), identity_{} {
    const auto failed = [&] { return std::system_error(errno, std::generic_category(), path_); };
    const Descriptor file{open(path_.c_str(), O_RDONLY | O_CLOEXEC)};
    struct stat found {};
    if (file.number < 0 || fstat(file.number, &found) != 0) throw failed();
    if (S_ISDIR(found.st_mode)) throw std::system_error(EISDIR, std::generic_category(), path_);
    identity_ = identity_of(found);
    if (identity_.bytes == 0) return;  // an empty file cannot be mapped
    void* at = mmap(nullptr, static_cast<size_t>(identity_.bytes), PROT_READ, MAP_SHARED, file.number, 0);
    if (at == MAP_FAILED) throw failed();
    data_ = static_cast<const char*>(at);
}

Map::~Map() {
    if (identity_.bytes > 0) munmap(const_cast<char*>(data_), static_cast<size_t>(identity_.bytes));
}

bool Map::unchanged() const {
    struct stat found {};
    return stat(path_.c_str(), &found) == 0 && identity_of(found) == identity_;
}

int64_t Map::readable() const {
    struct stat found {};
    if (stat(path_.c_str(), &found) != 0) return bytes();  // deleted or moved: the mapping holds what it was
    const Identity now = identity_of(found);
    const bool same = now.device == identity_.device && now.inode == identity_.inode;
    return same ? std::min(now.bytes, bytes()) : bytes();
}

}  // namespace mainspring
