// The kernels, compiled once for each instruction set: an isa_*.cpp defines ISA, sets the target and includes this.
// LANES (floats a register) and BF16_PRODUCTS come from there too: g++ does not redefine __AVX512F__ for a target pragma.
#define INLINE static inline __attribute__((always_inline))
#if defined(_OPENMP)  // the only licence to reorder a sum: no -ffast-math, whose crtfastmath.o would set FTZ process-wide
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
