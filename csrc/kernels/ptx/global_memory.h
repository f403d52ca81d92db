#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace scattermoe::kernels::ptx {

// 16 bytes that nobody writes during the kernel and nobody reads again from this SM.
__device__ __forceinline__ uint4 load_global_once(const void* pointer) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(pointer));
    return value;
}

// 16 bytes that nobody reads again, the first to leave the caches. In this place of the program: these loads stay in
// order among themselves and other volatile instructions. What they read may be written later in the kernel.
__device__ __forceinline__ uint4 load_global_streaming(const void* pointer) {
    uint4 value;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(pointer));
    return value;
}

// 16 bytes in one piece: the compiler may make four stores of a uint4.
__device__ __forceinline__ void store_global_128(void* pointer, uint4 value) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

// 16 bytes that nobody reads soon.
__device__ __forceinline__ void store_global_streaming(void* pointer, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}

// Sends for a line, to be found in L2 later.
__device__ __forceinline__ void prefetch_l2(const void* pointer) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

}  // namespace scattermoe::kernels::ptx
