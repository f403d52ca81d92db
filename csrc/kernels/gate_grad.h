#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

namespace scattermoe::kernels {

// The end of the gates' gradient where a product has summed <dA', act(z)> over parts of the columns:
//   grad_gates[slot] = the sum of its parts, in their order (+ <grad[slot / top_k], bias[expert]>); zero for sentinels
struct GateGradParams {
    DType dtype = DType::kBFloat16;        // of grad and bias: bfloat16 or float16
    const float* gate_partials = nullptr;  // [parts, S], by grouped position
    int32_t parts = 0;
    const int32_t* slot_order = nullptr;      // [S]
    const int32_t* expert_offsets = nullptr;  // [E + 1]
    int32_t num_experts = 0;
    int64_t num_slots = 0;
    float* grad_gates = nullptr;  // [S] by slot
    const void* grad = nullptr;   // [S / top_k, out_features]
    const void* bias = nullptr;   // [E, out_features] or none
    int32_t top_k = 1;
    int64_t out_features = 0;
};

cudaError_t gate_grad(const GateGradParams& params, cudaStream_t stream);

}  // namespace scattermoe::kernels
