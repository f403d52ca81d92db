#pragma once

// Moves registers between the warpgroups of a block. All warps of a warpgroup call it; the kernel needs launch bounds
// with one block an SM, and each role one branch, or ptxas ignores it (and says so).

#include <cuda_runtime.h>

namespace scattermoe::kernels::ptx {

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_decrease() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_increase() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace scattermoe::kernels::ptx
