#include "blend.hpp"

#include <algorithm>
#include <stdexcept>

#include "parallel.hpp"

namespace mainspring {
namespace {

constexpr int kScale = 40;
constexpr int64_t kLast = int64_t{1} << 62;      // positions and blocks beyond are "never"
constexpr int64_t kRange = int64_t{1} << 16;     // blocks from one start: 2^57 of time, or 2^59 with 65535 sources
constexpr uint64_t kNever = uint64_t{1} << 60;   // a step as long as this leads out of any range
constexpr int kPacked = 8;                       // up to here the sources' times fit registers

// One range's merge. Times are relative to its start: `next` of each source's next block.
struct Merge {
    std::vector<uint64_t> next, step;
    std::vector<int64_t> counts;
    std::vector<uint32_t> winners;  // a tree over the sources (its leaves are not stored), for more than kPacked

    void plant();
    void draw(int64_t blocks, uint16_t* source, int64_t* own);

   private:
    template <int N>
    void draw_packed(int64_t blocks, uint16_t* source, int64_t* own);
    void draw_tree(int64_t blocks, uint16_t* source, int64_t* own);
    uint32_t winner(size_t node, size_t leaves) const;
};

// A tree of comparisons that is unrolled, which compilers do not do for the loops that would say the same.
template <int First, int Count>
inline uint64_t least(const uint64_t* keys) {
    if constexpr (Count == 1) {
        return keys[First];
    } else {
        constexpr int kHalf = Count / 2;
        return std::min(least<First, kHalf>(keys), least<First + kHalf, Count - kHalf>(keys));
    }
}

// The source goes into the low bits of its time: the smallest of these keys is the earliest time and, on a tie, the
// first source. Only additions and minima, no branch that could be mispredicted.
template <int N>
void Merge::draw_packed(int64_t blocks, uint16_t* source, int64_t* own) {
    uint64_t key[N], stride[N];
    for (int i = 0; i < N; ++i) {
        key[i] = next[i] << 3 | static_cast<uint64_t>(i);
        stride[i] = step[i] << 3;
    }
    int64_t* count = counts.data();
    for (int64_t p = 0; p < blocks; ++p) {
        const uint64_t chosen = least<0, N>(key);
        for (int i = 0; i < N; ++i) key[i] += key[i] == chosen ? stride[i] : 0;
        source[p] = static_cast<uint16_t>(chosen & 7);
        own[p] = count[chosen & 7]++;
    }
    for (int i = 0; i < N; ++i) next[i] = key[i] >> 3;
}

// The left child wins a tie: it stands for the sources before.
uint32_t Merge::winner(size_t node, size_t leaves) const {
    const size_t sources = next.size();
    const auto child = [&](size_t n) {
        if (n < leaves) return winners[n];
        return static_cast<uint32_t>(std::min(n - leaves, sources - 1));
    };
    const uint32_t left = child(2 * node), right = child(2 * node + 1);
    return next[left] <= next[right] ? left : right;
}

void Merge::plant() {
    if (next.size() <= kPacked) return;
    size_t leaves = 1;
    while (leaves < next.size()) leaves *= 2;
    winners.resize(leaves);
    for (size_t node = leaves - 1; node >= 1; --node) winners[node] = winner(node, leaves);
}

void Merge::draw_tree(int64_t blocks, uint16_t* source, int64_t* own) {
    const size_t leaves = winners.size();
    for (int64_t p = 0; p < blocks; ++p) {
        const uint32_t chosen = winners[1];
        next[chosen] += step[chosen];
        source[p] = static_cast<uint16_t>(chosen);
        own[p] = counts[chosen]++;
        for (size_t node = (leaves + chosen) / 2; node >= 1; node /= 2) winners[node] = winner(node, leaves);
    }
}

void Merge::draw(int64_t blocks, uint16_t* source, int64_t* own) {
    switch (next.size()) {
        case 1: return draw_packed<1>(blocks, source, own);
        case 2: return draw_packed<2>(blocks, source, own);
        case 3: return draw_packed<3>(blocks, source, own);
        case 4: return draw_packed<4>(blocks, source, own);
        case 5: return draw_packed<5>(blocks, source, own);
        case 6: return draw_packed<6>(blocks, source, own);
        case 7: return draw_packed<7>(blocks, source, own);
        case 8: return draw_packed<8>(blocks, source, own);
        default: return draw_tree(blocks, source, own);
    }
}

}  // namespace

class Blend::Cursor {
   public:
    Cursor(const Blend& blend, int64_t position) : blend_(blend) {
        begin(position);
        skip(position - position_);
    }

    const std::vector<int64_t>& counts() const { return merge_.counts; }

    // Goes to `position`: on from here where it is near, else by the closed form.
    void seek(int64_t position) {
        const int64_t ahead = position - position_;
        if (ahead >= 0 && ahead <= 4 * blend_.sources() + 4 && position - start_ < kRange) return skip(ahead);
        begin(position);
        skip(position - position_);
    }

    // At most kRange blocks after a seek.
    void draw(int64_t blocks, uint16_t* source, int64_t* own) {
        merge_.draw(blocks, source, own);
        position_ += blocks;
    }

   private:
    // A time before which there are at most `position` blocks, and not many fewer; the merge begins there.
    void begin(int64_t position) {
        const int64_t sources = blend_.sources();
        Time time = position > sources ? static_cast<Time>(position - sources) << kScale : 0;
        merge_.counts.resize(static_cast<size_t>(sources));
        while (true) {
            int64_t total = 0;
            for (int64_t i = 0; i < sources; ++i) {
                merge_.counts[static_cast<size_t>(i)] = blend_.before(i, time);
                total += merge_.counts[static_cast<size_t>(i)];
            }
            position_ = start_ = total;
            const int64_t missing = position - total;
            if (missing >= 0 && missing <= 3 * sources + 4) break;
            // Newton's step: the blocks' density is 2^-40 but for roundings, so that this comes down to the few blocks
            // that the sources' phases are worth, all of which lie within the bound above.
            const __int128 wanted = static_cast<__int128>(missing - sources) * (__int128{1} << kScale);
            const __int128 moved = static_cast<__int128>(time) + wanted;
            time = moved > 0 ? static_cast<Time>(moved) : 0;
        }
        merge_.next.resize(merge_.counts.size());
        merge_.step.resize(merge_.counts.size());
        for (size_t i = 0; i < merge_.counts.size(); ++i) {
            const Time step = blend_.steps_[i], at = static_cast<Time>(merge_.counts[i]) * step + step / 2;
            merge_.next[i] = static_cast<uint64_t>(std::min<Time>(at - time, kNever));
            merge_.step[i] = static_cast<uint64_t>(std::min<Time>(step, kNever));
        }
        merge_.plant();
    }

    void skip(int64_t blocks) {
        if (blocks == 0) return;
        scratch_source_.resize(static_cast<size_t>(blocks));
        scratch_own_.resize(static_cast<size_t>(blocks));
        draw(blocks, scratch_source_.data(), scratch_own_.data());
    }

    const Blend& blend_;
    Merge merge_;
    int64_t position_ = 0, start_ = 0;
    std::vector<uint16_t> scratch_source_;
    std::vector<int64_t> scratch_own_;
};

Blend::Blend(const int64_t* weights, int64_t sources) {
    if (sources < 1 || sources > 65535) throw std::invalid_argument("a blend has 1 to 65535 sources");
    int64_t total = 0;
    for (int64_t i = 0; i < sources; ++i) {
        if (weights[i] < 1 || weights[i] >= kLast || (total += weights[i]) >= kLast)
            throw std::invalid_argument("weights must be positive, and their sum below 2^62");
    }
    steps_.reserve(static_cast<size_t>(sources));
    for (int64_t i = 0; i < sources; ++i) {
        const auto weight = static_cast<Time>(weights[i]);
        steps_.push_back(((static_cast<Time>(total) << kScale) + weight / 2) / weight);
    }
}

int64_t Blend::before(int64_t source, Time time) const {
    const Time step = steps_[static_cast<size_t>(source)], half = step / 2;
    return time <= half ? 0 : static_cast<int64_t>((time - half - 1) / step + 1);
}

void Blend::counts(int64_t position, int64_t* counts) const {
    if (position < 0 || position > kLast) throw std::out_of_range("a blend's position is 0 to 2^62");
    const Cursor cursor(*this, position);
    std::copy(cursor.counts().begin(), cursor.counts().end(), counts);
}

bool Blend::time_of(int64_t source, int64_t own, Time& time) const {
    const Time step = steps_[static_cast<size_t>(source)], last = static_cast<Time>(kLast) << kScale;
    if (own > 0 && step > last / static_cast<Time>(own)) return false;
    time = static_cast<Time>(own) * step + step / 2;
    return time <= last;
}

int64_t Blend::earliest(const int64_t* own) const {
    int64_t found = -1;
    Time least = 0;
    for (int64_t i = 0; i < sources(); ++i) {
        Time time = 0;
        if (own[i] < 0 || !time_of(i, own[i], time) || (found >= 0 && time >= least)) continue;
        found = i;
        least = time;
    }
    return found;
}

int64_t Blend::rank(int64_t source, int64_t own) const {
    if (source < 0 || source >= sources() || own < 0) throw std::out_of_range("no such block");
    Time time = 0;
    if (!time_of(source, own, time)) return kLast;
    int64_t position = own;
    for (int64_t i = 0; i < sources(); ++i) {  // on a tie the sources before come first
        if (i != source) position += std::min(kLast - position, before(i, i < source ? time + 1 : time));
    }
    return position;
}

void Blend::range(int64_t first, int64_t count, int threads, uint16_t* source, int64_t* own) const {
    if (first < 0 || count < 0 || first > kLast || count > kLast - first)
        throw std::out_of_range("a blend's position is 0 to 2^62");
    parallel_ranges(count, kRange, threads, [&](int64_t begin, int64_t end) {
        Cursor(*this, first + begin).draw(end - begin, source + begin, own + begin);
    });
}

void Blend::locate(const int64_t* positions, int64_t count, int64_t* source, int64_t* own) const {
    if (count == 0) return;
    for (int64_t p = 0; p < count; ++p)
        if (positions[p] < 0 || positions[p] >= kLast) throw std::out_of_range("a blend's position is 0 to 2^62");
    Cursor cursor(*this, positions[0]);
    for (int64_t p = 0; p < count; ++p) {
        cursor.seek(positions[p]);
        uint16_t chosen = 0;
        cursor.draw(1, &chosen, own + p);
        source[p] = chosen;
    }
}

}  // namespace mainspring
