#pragma once

#include <cuda_runtime.h>

#include "activation.h"
#include "grouped_gemm.h"

namespace scattermoe::kernels {

// z = in W_up^T + b_up, hidden = act(z): the product and the activation, in one pass where there is a kernel for it.
struct UpProjectionParams {
    GroupedGemmParams gemm;  // out is z, its rows contiguous and in grouped order
    ActivationParams activation;
    void* hidden = nullptr;  // [S, width] contiguous; width is n, or half of it when the activation is gated
};

// Whether one kernel computes both; z may then be none where nobody wants it.
bool up_projection_is_fused(const UpProjectionParams& params);

// fused: what up_projection_is_fused() said.
cudaError_t up_projection(const UpProjectionParams& params, bool fused, cudaStream_t stream);

}  // namespace scattermoe::kernels
