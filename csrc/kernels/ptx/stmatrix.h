#pragma once

// stmatrix: four 8x8 matrices of 16-bit elements to shared memory, one row address from each lane (sm_90 and newer).
// Lane l gives the address of row l % 8 of matrix l / 8 and holds, of matrix i, elements 2 (l % 4) and the next of row
// l / 4 in register i: the layout of an accumulator.

#include <cuda_runtime.h>

#include <cstdint>

namespace scattermoe::kernels::ptx {

__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1),
                 "r"(r2), "r"(r3)
                 : "memory");
}

// The matrices' transposes: the addresses are of their columns.
__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2,
                                                       uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0),
                 "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}

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

}  // namespace scattermoe::kernels::ptx
