#pragma once

// cp.async: global to shared memory without passing through registers (sm_80 and newer).

#include <cuda_runtime.h>

#include <cstdint>

namespace scattermoe::kernels::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes; the source must be 16-byte aligned. It bypasses L1: a tile is read once by each block. The L2
// prefetch hint fetches whole 128-byte lines.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// The same, but only the first source_bytes are read and the rest become zero.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, int source_bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(source_bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace scattermoe::kernels::ptx
