#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "activation_kernels.h"
#include "grouped_gemm.h"

namespace scattermoe::kernels {

// The backward through y = act(z) W_down^T + b_down: dh = dy W_down and what ActivationBackwardParams says of it, the
// product and the activation in one pass where there is a kernel for it.
struct DownProjectionBackwardParams {
    GroupedGemmParams gemm;               // dh = dy W_down, its rows contiguous and in grouped order
    ActivationBackwardParams activation;  // grad_hidden: not looked at
    float* gate_partials = nullptr;       // [gate_parts(), S], where that is not 0
};

// Whether one kernel computes both; out is then not needed. Else it is, and gated_hidden may be the same.
bool down_projection_backward_is_fused(const DownProjectionBackwardParams& params);

// How many sums for each slot the fused kernel leaves to be added up; 0 where it leaves none, or is another.
// fused, here and below: what down_projection_backward_is_fused() said.
int32_t gate_parts(const DownProjectionBackwardParams& params, bool fused);

cudaError_t down_projection_backward(const DownProjectionBackwardParams& params, bool fused, cudaStream_t stream);

}  // namespace scattermoe::kernels
