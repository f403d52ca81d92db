#pragma once

// Loads and stores of shared memory by address.

#include <cuda_runtime.h>

#include <cstdint>

namespace scattermoe::kernels::ptx {

__device__ __forceinline__ void store_shared_64(uint32_t address, uint32_t r0, uint32_t r1) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(r0), "r"(r1) : "memory");
}

__device__ __forceinline__ uint2 load_shared_64(uint32_t address) {
    uint2 value;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address) : "memory");
    return value;
}

__device__ __forceinline__ uint4 load_shared_128(uint32_t address) {
    uint4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address)
                 : "memory");
    return value;
}

__device__ __forceinline__ void store_shared_32(uint32_t address, int value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_16(uint32_t address, int value) {
    asm volatile("{\n.reg .b16 low;\ncvt.u16.u32 low, %1;\nst.shared.b16 [%0], low;\n}" ::"r"(address), "r"(value)
                 : "memory");
}

__device__ __forceinline__ int load_shared_16(uint32_t address) {
    int value;
    asm volatile("{\n.reg .u16 low;\nld.shared.u16 low, [%1];\ncvt.u32.u16 %0, low;\n}" : "=r"(value) : "r"(address));
    return value;
}

__device__ __forceinline__ uint32_t load_shared_32(uint32_t address) {
    uint32_t value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

__device__ __forceinline__ void store_shared_128(uint32_t address, const uint4& value) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

// A flag: who loads the value sees all that was written by the storing thread before it.
__device__ __forceinline__ void store_shared_release(uint32_t address, int value) {
    asm volatile("st.release.cta.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ int load_shared_acquire(uint32_t address) {
    int value;
    asm volatile("ld.acquire.cta.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

}  // namespace scattermoe::kernels::ptx
