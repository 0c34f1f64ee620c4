// Examples into rows of a fixed number of positions.
#pragma once

#include <cstdint>
#include <vector>

namespace mainspring {

// starts[r] is where row r begins in items; starts.back() == items.size().
struct Packing {
    std::vector<int64_t> items, starts;
};

// Best-fit decreasing (Johnson 1974): the examples order[0], order[1], ... by size, largest first and equal ones in the
// given order, each into the fullest row that still takes it, or into a new one. O(count + capacity) besides a search
// of at most four words an example. How many rows there are, and how full each is, does not depend on the order.
// std::invalid_argument for a size outside [1, capacity], and that or std::out_of_range where order is no permutation of
// [0, count).
Packing pack(const int32_t* sizes, const int64_t* order, int64_t count, int64_t capacity);

}  // namespace mainspring
