// Choice of the instruction set, and the split of rows over threads.
#pragma once
#include <cstdint>
#include <string>
#if defined(_OPENMP)
#include <omp.h>
#endif
#include "kernels.h"

namespace mainspring {

const Kernels& kernels();                       // the best this processor runs, or the one chosen below
bool choose_kernels(const std::string& name);   // "avx512_bf16", "avx512", "avx2", "plain"; false where it cannot run

// Calls body(begin, end, thread) on contiguous, fixed shares of the rows. The caller's thread works too, so one
// thread costs nothing; threads without rows are called with begin == end (they zero their partial sums).
template <class Body>
void split_rows(int64_t rows, int threads, const Body& body) {
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int t = 0; t < threads; ++t) body(rows * t / threads, rows * (t + 1) / threads, t);
        return;
    }
#endif
    for (int t = 0; t < threads; ++t) body(rows * t / threads, rows * (t + 1) / threads, t);
}

}  // namespace mainspring
