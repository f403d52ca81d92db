#pragma once

#include <cuda_runtime.h>

namespace scattermoe::kernels::ptx {

// One of the block's sixteen hardware barriers, for kThreads of its threads; 0 is that of __syncthreads().
template <int kThreads>
__device__ __forceinline__ void named_barrier_sync(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

}  // namespace scattermoe::kernels::ptx
