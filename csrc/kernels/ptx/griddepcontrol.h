#pragma once

// A grid and the one before it in the stream, where it was launched to begin early (dependent_launch.h). On GPUs before
// compute capability 9.0 none is, and there is nothing to wait for.

#include <cuda_runtime.h>

namespace scattermoe::kernels::ptx {

// Waits until the grid before is done and what it wrote is there.
__device__ __forceinline__ void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The grid after may begin, on SMs with room for it, once all blocks have come here.
__device__ __forceinline__ void grid_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace scattermoe::kernels::ptx
