#include "packing.hpp"

#include <stdexcept>
#include <string>

namespace mainspring {
namespace {

// A set of integers in [0, size) that finds its next member: a tree of words of 64 bits, a bit of the level above says
// whether a word has any.
class Members {
   public:
    explicit Members(int64_t size) {
        do {
            size = (size + 63) / 64;
            levels_.emplace_back(static_cast<size_t>(size), uint64_t{0});
        } while (size > 1);
    }

    void add(int64_t value) {
        for (auto& level : levels_) {
            uint64_t& word = level[static_cast<size_t>(value >> 6)];
            const bool known = word != 0;
            word |= uint64_t{1} << (value & 63);
            if (known) return;
            value >>= 6;
        }
    }

    void remove(int64_t value) {
        for (auto& level : levels_) {
            uint64_t& word = level[static_cast<size_t>(value >> 6)];
            word &= ~(uint64_t{1} << (value & 63));
            if (word != 0) return;
            value >>= 6;
        }
    }

    // The smallest member that is not below value, or -1.
    int64_t next(int64_t value) const {
        size_t level = 0;
        for (;; ++level, value = (value >> 6) + 1) {
            if (level == levels_.size()) return -1;
            const auto word = static_cast<size_t>(value >> 6);
            if (word >= levels_[level].size()) return -1;
            const uint64_t rest = levels_[level][word] >> (value & 63);
            if (rest != 0) {
                value += __builtin_ctzll(rest);
                break;
            }
        }
        while (level > 0) {
            --level;
            value = (value << 6) + __builtin_ctzll(levels_[level][static_cast<size_t>(value)]);
        }
        return value;
    }

   private:
    std::vector<std::vector<uint64_t>> levels_;
};

// order by size, largest first, stable: one counting sort.
std::vector<int64_t> decreasing(const int32_t* sizes, const int64_t* order, int64_t count, int64_t capacity) {
    std::vector<int64_t> place(static_cast<size_t>(capacity) + 2, 0);  // by capacity - size
    for (int64_t i = 0; i < count; ++i) {
        if (sizes[i] < 1 || sizes[i] > capacity)
            throw std::invalid_argument("example " + std::to_string(i) + " takes " + std::to_string(sizes[i]) +
                                        " positions, a row has " + std::to_string(capacity));
        ++place[static_cast<size_t>(capacity - sizes[i]) + 1];
    }
    for (size_t i = 1; i < place.size(); ++i) place[i] += place[i - 1];
    std::vector<int64_t> sorted(static_cast<size_t>(count));
    std::vector<bool> seen(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
        if (order[i] < 0 || order[i] >= count) throw std::out_of_range("order names no example");
        if (seen[static_cast<size_t>(order[i])]) throw std::invalid_argument("order names an example twice");
        seen[static_cast<size_t>(order[i])] = true;
        sorted[static_cast<size_t>(place[static_cast<size_t>(capacity - sizes[order[i]])]++)] = order[i];
    }
    return sorted;
}

}  // namespace

Packing pack(const int32_t* sizes, const int64_t* order, int64_t count, int64_t capacity) {
    const std::vector<int64_t> sorted = decreasing(sizes, order, count, capacity);
    Members rooms(capacity + 1);                                      // room that some row has left
    std::vector<int64_t> first(static_cast<size_t>(capacity) + 1, -1);  // by room: a row that has just that, ...
    std::vector<int64_t> after;                                       // ... and by row the next one of the same room
    std::vector<int64_t> row_of(static_cast<size_t>(count));          // by place in sorted
    for (int64_t i = 0; i < count; ++i) {
        const int64_t size = sizes[sorted[static_cast<size_t>(i)]];
        int64_t room = rooms.next(size), row;
        if (room < 0) {
            row = static_cast<int64_t>(after.size());
            after.push_back(-1);
            room = capacity;
        } else {
            row = first[static_cast<size_t>(room)];
            if ((first[static_cast<size_t>(room)] = after[static_cast<size_t>(row)]) < 0) rooms.remove(room);
        }
        row_of[static_cast<size_t>(i)] = row;
        if (const int64_t left = room - size; left > 0) {
            after[static_cast<size_t>(row)] = first[static_cast<size_t>(left)];
            first[static_cast<size_t>(left)] = row;
            rooms.add(left);
        }
    }
    Packing packing{std::vector<int64_t>(static_cast<size_t>(count)), std::vector<int64_t>(after.size() + 1, 0)};
    for (const int64_t row : row_of) ++packing.starts[static_cast<size_t>(row) + 1];
    for (size_t row = 1; row < packing.starts.size(); ++row) packing.starts[row] += packing.starts[row - 1];
    std::vector<int64_t> next(packing.starts.begin(), packing.starts.end() - 1);
    for (int64_t i = 0; i < count; ++i)
        packing.items[static_cast<size_t>(next[static_cast<size_t>(row_of[static_cast<size_t>(i)])]++)] =
            sorted[static_cast<size_t>(i)];
    return packing;
}

}  // namespace mainspring
