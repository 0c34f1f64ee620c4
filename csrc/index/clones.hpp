// A loop that the compiler writes once for each instruction set; the processor's best is taken when the library loads.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MAINSPRING_CLONES \
    __attribute__((target_clones("avx2", "default")))  // they wait for memory: wider vectors gain nothing
#else
#define MAINSPRING_CLONES
#endif
