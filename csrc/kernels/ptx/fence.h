#pragma once

#include <cuda_runtime.h>

namespace scattermoe::kernels::ptx {

// Orders this thread's view of shared memory between the generic proxy (loads, stores, cp.async, stmatrix) and the
// asynchronous one (wgmma, TMA): after ordinary writes, or a barrier that says that they are there, and before the
// tensor cores or the copy engine read.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace scattermoe::kernels::ptx
