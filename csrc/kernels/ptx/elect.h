#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace scattermoe::kernels::ptx {

// True in one lane, always the same one, of a warp that asks together. Under a condition on the lane's number instead,
// the compiler does not know that one lane is left, and wraps every bulk copy in a loop over the lanes.
__device__ __forceinline__ bool elect() {
    uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred elected;\n"
        "elect.sync _|elected, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, elected;\n"
        "}"
        : "=r"(elected));
    return elected != 0;
}

}  // namespace scattermoe::kernels::ptx
