// The kernels, compiled once for each instruction set: an isa_*.cpp defines ISA, sets the target and includes this.
// LANES (floats a register) and BF16_PRODUCTS come from there too: a target pragma leaves __AVX512F__ undefined in g++.
#define INLINE static inline __attribute__((always_inline))
// The only licence to reorder a sum: no -ffast-math, whose crtfastmath.o would flush denormals in the whole process.
#if defined(_OPENMP)
#define PRAGMA(text) _Pragma(#text)
#define SIMD PRAGMA(omp simd)
#define SIMD_SUM(v) PRAGMA(omp simd reduction(+ : v))
#define SIMD_MAX(v) PRAGMA(omp simd reduction(max : v))
#else
#define SIMD
#define SIMD_SUM(v)
#define SIMD_MAX(v)
#endif

namespace mainspring {
namespace ISA {
#include "elementwise.h"
#include "rms_norm.h"
#include "rotary.h"
#include "swiglu.h"
#include "cross_entropy.h"
#include "product.h"
#include "attention.h"
}  // namespace ISA
}  // namespace mainspring

#define KERNELS(name)                                                                                             \
    {name, ISA::rms_norm_fwd, ISA::rms_norm_bwd, ISA::split_rotary_fwd, ISA::split_rotary_bwd, ISA::swiglu_fwd,     \
     ISA::swiglu_bwd, ISA::cross_entropy_stats, ISA::cross_entropy_grad, ISA::attention_workspace,                  \
     ISA::attention_fwd, ISA::attention_bwd}
