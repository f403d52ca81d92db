#pragma once

// What expert_offsets say on the device.

#include <cuda_runtime.h>

#include <cstdint>

namespace scattermoe::kernels {

// The expert of a grouped position that belongs to one.
__device__ __forceinline__ int expert_of(const int32_t* expert_offsets, int num_experts, int64_t position) {
    int low = 0, high = num_experts - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (position < expert_offsets[middle + 1]) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

}  // namespace scattermoe::kernels
