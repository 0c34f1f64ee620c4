// The kernels for processors with AVX2 and FMA (Haswell, Zen and later).
#include "kernels.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target( \
    "avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif
#define ISA avx2
#define LANES 8
#include "isa_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
namespace mainspring {
const Kernels kernels_avx2 = KERNELS("avx2");
}  // namespace mainspring
#endif
