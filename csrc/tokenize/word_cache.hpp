// Words that were met before and their ids. One cache belongs to one thread; it is bounded, and only ever saves time.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace mainspring {

// Words of up to 15 bytes with up to three ids: 32 bytes each, two in a cache line, the newer one first.
class ShortWords {
  public:
    static constexpr uint32_t kBytes = 15, kIds = 3;

    struct Key {
        uint64_t low, high;  // the bytes, zeros behind them, in the last byte their number
        bool operator==(const Key& other) const { return low == other.low && high == other.high; }
    };
    struct Slot {
        Key key{0, 0};  // no word has no bytes
        int32_t ids[kIds]{};
        uint32_t count = 0;
    };

    ShortWords() : pairs_(kPairs) {}

    // size <= kBytes; `limit` ends the memory that may be read.
    static Key key(const uint8_t* word, uint32_t size, const uint8_t* limit) {
        Key key{0, 0};
        if (limit - word >= 16) {
            std::memcpy(&key.low, word, 8);
            std::memcpy(&key.high, word + 8, 8);
            key.low &= kTables.mask[size].low, key.high &= kTables.mask[size].high;
        } else {
            uint8_t bytes[16] = {};
            std::memcpy(bytes, word, size);
            std::memcpy(&key.low, bytes, 8);
            std::memcpy(&key.high, bytes + 8, 8);
        }
        key.high |= kTables.size[size];
        return key;
    }

    static uint64_t place(const Key& key) {
        uint64_t mixed = (key.low ^ (key.high * 0x9E3779B97F4A7C15u)) * 0xD6E8FEB86659FD93u;
        mixed ^= mixed >> 32;
        return (mixed * 0x9E3779B97F4A7C15u) >> (64 - kBits);
    }

    const Slot* find(const Key& key, uint64_t place) const {
        const Pair& pair = pairs_[place];
        if (pair.slot[0].key == key) return &pair.slot[0];
        return pair.slot[1].key == key ? &pair.slot[1] : nullptr;
    }

    void add(const Key& key, uint64_t place, const int32_t* ids, uint32_t count) {
        Pair& pair = pairs_[place];
        pair.slot[1] = pair.slot[0];
        Slot& slot = pair.slot[0];
        slot.key = key, slot.count = count;
        std::memcpy(slot.ids, ids, count * sizeof(int32_t));
    }

  private:
    static constexpr int kBits = 15;  // 2 MB: more misses the second-level cache more than it saves
    static constexpr uint64_t kPairs = uint64_t{1} << kBits;
    struct alignas(64) Pair {
        Slot slot[2];
    };
    // Made of bytes, so that the order in which a machine stores them does not matter.
    struct Tables {
        Key mask[16];
        uint64_t size[16];
        Tables() {
            for (int n = 0; n < 16; ++n) {
                uint8_t bytes[16] = {}, last[8] = {};
                std::memset(bytes, 0xFF, n);
                std::memcpy(&mask[n].low, bytes, 8);
                std::memcpy(&mask[n].high, bytes + 8, 8);
                last[7] = static_cast<uint8_t>(n);
                std::memcpy(&size[n], last, 8);
            }
        }
    };
    inline static const Tables kTables;

    std::vector<Pair> pairs_;
};

// All other words of up to 512 bytes. Forgets everything when it is full.
class LongWords {
  public:
    static constexpr uint32_t kBytes = 512;

    struct Slot {
        uint64_t hash = 0;
        uint32_t bytes_at = 0, size = 0, ids_at = 0, count = 0;
    };

    LongWords() : slots_(kSlots) {}

    static uint64_t hash(const uint8_t* word, uint32_t size) {
        uint64_t mixed = size * 0x9E3779B97F4A7C15u;
        const auto mix = [&mixed](uint64_t eight) {
            mixed = (mixed ^ eight) * 0xD6E8FEB86659FD93u;
            mixed ^= mixed >> 29;
        };
        uint64_t eight;
        for (; size >= 8; word += 8, size -= 8) {
            std::memcpy(&eight, word, 8);
            mix(eight);
        }
        eight = 0;
        std::memcpy(&eight, word, size);
        mix(eight);
        return mixed * 0x9E3779B97F4A7C15u;
    }

    // The ids (count of them), nullptr if the word is not there.
    const int32_t* find(const uint8_t* word, uint32_t size, uint64_t hash, uint32_t& count) const {
        const Slot& slot = slots_[hash >> (64 - kBits)];
        if (slot.hash != hash || slot.size != size || std::memcmp(bytes_.data() + slot.bytes_at, word, size)) return nullptr;
        count = slot.count;
        return ids_.data() + slot.ids_at;
    }

    void add(const uint8_t* word, uint32_t size, uint64_t hash, const int32_t* ids, uint32_t count) {
        if (bytes_.size() + size > kHeld || ids_.size() + count > kHeld / 4) {
            bytes_.clear(), ids_.clear();
            slots_.assign(kSlots, Slot{});
        }
        slots_[hash >> (64 - kBits)] = {hash, static_cast<uint32_t>(bytes_.size()), size,
                                        static_cast<uint32_t>(ids_.size()), count};
        bytes_.insert(bytes_.end(), word, word + size);
        ids_.insert(ids_.end(), ids, ids + count);
    }

  private:
    static constexpr int kBits = 16;
    static constexpr uint64_t kSlots = uint64_t{1} << kBits, kHeld = uint64_t{1} << 22;

    std::vector<Slot> slots_;
    std::vector<uint8_t> bytes_;
    std::vector<int32_t> ids_;
};

}  // namespace mainspring
