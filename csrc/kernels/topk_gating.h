#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "scoring.h"
#include "types.h"

namespace scattermoe::kernels {

// Compute type: double for float64 logits, else float.
struct TopkGatingParams {
    DType dtype = DType::kFloat32;
    const void* logits = nullptr;  // [T, E]
    const void* bias = nullptr;    // [E] in the compute type, or none: added to the scores for the selection alone
    Scoring scoring = Scoring::kSoftmax;
    bool normalize = false;
    double scale = 1.0;
    int64_t num_tokens = 0;
    int32_t num_experts = 0;
    int32_t k = 1;
    int32_t num_groups = 1;
    int32_t top_groups = 1;
    void* gates = nullptr;          // [T, k] in the compute type
    int64_t* expert_ids = nullptr;  // [T, k]
};

cudaError_t topk_gating(const TopkGatingParams& params, cudaStream_t stream);

struct TopkGatingBackwardParams {
    DType dtype = DType::kFloat32;
    const void* grad_gates = nullptr;  // [T, k] in the compute type
    const void* logits = nullptr;      // [T, E]
    const int64_t* expert_ids = nullptr;
    Scoring scoring = Scoring::kSoftmax;
    bool normalize = false;
    double scale = 1.0;
    int64_t num_tokens = 0;
    int32_t num_experts = 0;
    int32_t k = 1;
    void* grad_logits = nullptr;  // [T, E]
};

cudaError_t topk_gating_backward(const TopkGatingBackwardParams& params, cudaStream_t stream);

}  // namespace scattermoe::kernels
