#include "random.hpp"

namespace mainspring {

Permutation::Permutation(uint64_t key, int64_t count) : count_(count) {
    if (count <= kTable) {
        table_.resize(static_cast<size_t>(count));
        shuffle(key, count, table_.data());
        return;
    }
    int bits = 0;
    while (static_cast<uint64_t>(count - 1) >> bits != 0) ++bits;
    high_bits_ = bits / 2;
    low_bits_ = bits - high_bits_;
    Stream stream{key};
    for (uint64_t& round : keys_) round = stream.next();
}

int64_t Permutation::operator()(int64_t place) const {
    if (!table_.empty()) return table_[static_cast<size_t>(place)];
    const int high_shift = 64 - high_bits_, low_shift = 64 - low_bits_;
    const uint64_t low_mask = (uint64_t{1} << low_bits_) - 1;
    auto value = static_cast<uint64_t>(place);
    do {
        uint64_t high = value >> low_bits_, low = value & low_mask;
        for (int round = 0; round < kRounds; round += 2) {
            high ^= mix(keys_[round] + low * kGolden) >> high_shift;
            low ^= mix(keys_[round + 1] + high * kGolden) >> low_shift;
        }
        value = high << low_bits_ | low;
    } while (value >= static_cast<uint64_t>(count_));
    return static_cast<int64_t>(value);
}

}  // namespace mainspring
