#include "launch.h"

namespace mainspring {

static const Kernels* runnable(const std::string& name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (name == "avx512_bf16" && __builtin_cpu_supports("avx512bf16") && runnable("avx512"))
        return &kernels_avx512_bf16;
    if (name == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return &kernels_avx512;
    if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2"))
        return &kernels_avx2;
#endif
    return name == "plain" ? &kernels_plain : nullptr;
}

static const Kernels* best() {
    for (const char* name : {"avx512_bf16", "avx512", "avx2", "plain"})
        if (const Kernels* found = runnable(name)) return found;
    return &kernels_plain;
}

static const Kernels*& chosen() {
    static const Kernels* table = best();
    return table;
}

const Kernels& kernels() { return *chosen(); }

bool choose_kernels(const std::string& name) {
    const Kernels* found = runnable(name);
    if (found) chosen() = found;
    return found != nullptr;
}

}  // namespace mainspring
