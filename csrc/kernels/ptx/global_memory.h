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

}  // namespace scattermoe::kernels::ptx
