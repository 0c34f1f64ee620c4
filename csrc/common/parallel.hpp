// Threads for the extensions: plain std::thread, since none of them is linked to an OpenMP runtime.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace mainspring {

// Cores that this process may use: a container's or a scheduler's affinity counts, not the machine's size.
inline int available_cores() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1u, std::thread::hardware_concurrency());
}

// body(first, last) for consecutive ranges that cover [0, count), at most `threads` at once (0: the available cores).
// Ranges are handed out as threads ask for them. The first exception is rethrown, once all threads have ended.
template <class Body>
void parallel_ranges(int64_t count, int64_t range, int threads, const Body& body) {
    if (count <= 0) return;
    range = std::max<int64_t>(1, range);
    const int64_t ranges = (count + range - 1) / range;
    const int workers = static_cast<int>(std::min<int64_t>(threads > 0 ? threads : available_cores(), ranges));
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex guard;
    const auto work = [&] {
        try {
            for (int64_t i = next++; i < ranges; i = next++) body(i * range, std::min(count, (i + 1) * range));
        } catch (...) {
            const std::lock_guard<std::mutex> hold(guard);
            if (!failure) failure = std::current_exception();
            next = ranges;
        }
    };
    std::vector<std::thread> pool;
    try {
        for (int i = 1; i < workers; ++i) pool.emplace_back(work);
    } catch (...) {  // no more threads to be had: those that run, and this one, do the work
    }
    work();
    for (std::thread& thread : pool) thread.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace mainspring
