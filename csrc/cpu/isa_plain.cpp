// The kernels for any processor the compiler targets by default.
#include "kernels.h"
#define ISA plain
#define LANES 4
#include "isa_body.h"
namespace mainspring {
const Kernels kernels_plain = KERNELS("plain");
}  // namespace mainspring
