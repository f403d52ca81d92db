#pragma once

// Compiles a function once for each of these instruction sets and picks the best at load time: the library is built for
// the oldest x86-64 and still uses what the machine has. Everything such a function calls must be inlined into it.
#if defined(__x86_64__) && defined(__linux__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define SCATTERMOE_SIMD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif

#if !defined(SCATTERMOE_SIMD_CLONES)
#define SCATTERMOE_SIMD_CLONES
#endif

#define SCATTERMOE_INLINE inline __attribute__((always_inline))
