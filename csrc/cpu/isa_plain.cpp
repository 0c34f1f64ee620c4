// The kernels for any processor the compiler targets by default.
#include "kernels.h"
#define ISA plain
#define LANES 4
#include "isa_body.h"
namespace mainspring {
const Kernels kernels_plain = {"plain", ISA::rms_norm_fwd, ISA::rms_norm_bwd, ISA::split_rotary_fwd, ISA::split_rotary_bwd,
    ISA::swiglu_fwd, ISA::swiglu_bwd, ISA::cross_entropy_stats, ISA::cross_entropy_grad,
    ISA::attention_workspace, ISA::attention_fwd, ISA::attention_bwd};
}  // namespace mainspring
