#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "grouped_gemm.h"
#include "types.h"

namespace scattermoe::kernels {

// out[e] = sum over the grouped positions p of expert e of gates[slot] * grad[rows(p), :]; zero without any.
struct BiasGradParams {
    DType dtype = DType::kBFloat16;
    const void* grad = nullptr;  // rows of n elements
    int64_t grad_stride = 0;
    RowMap grad_rows;
    const void* gates = nullptr;          // [S] by slot, float (double for float64); none means ones
    const int32_t* slot_order = nullptr;  // [S], read for gates alone
    const int32_t* expert_offsets = nullptr;
    int32_t num_experts = 0;
    int32_t num_slots = 0;
    int32_t n = 0;
    void* out = nullptr;        // [E, n]
    void* workspace = nullptr;  // as many bytes as bias_grad_workspace says
};

// Bytes of partial sums; zero where every expert's rows are summed by one block.
int64_t bias_grad_workspace(DType dtype, int32_t num_experts, int32_t num_slots, int32_t n);

cudaError_t bias_grad(const BiasGradParams& params, cudaStream_t stream);

}  // namespace scattermoe::kernels
