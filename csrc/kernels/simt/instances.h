#pragma once

// The fused multiply-add kernels, compiled in a file for each element type.

#include <cuda_runtime.h>

#include "../grouped_gemm.h"

namespace scattermoe::kernels::simt {

cudaError_t grouped_gemm_fp32(const GroupedGemmParams& params, cudaStream_t stream);
cudaError_t grouped_gemm_fp64(const GroupedGemmParams& params, cudaStream_t stream);

cudaError_t weight_grad_fp32(const WeightGradParams& params, cudaStream_t stream);
cudaError_t weight_grad_fp64(const WeightGradParams& params, cudaStream_t stream);

}  // namespace scattermoe::kernels::simt
