// A function compiled for AVX-512, AVX2 and the baseline, chosen when the extension is loaded.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MAINSPRING_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MAINSPRING_CLONES
#endif
