#pragma once

// The tensor-core kernels, one pair for each element type, each compiled in a file of its own. float stands for TF32.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../grouped_gemm.h"
#include "../select.h"

namespace scattermoe::kernels::sm80 {

cudaError_t grouped_gemm_bf16(const GroupedGemmParams& params, const GemmChoice& choice, cudaStream_t stream);
cudaError_t grouped_gemm_fp16(const GroupedGemmParams& params, const GemmChoice& choice, cudaStream_t stream);
cudaError_t grouped_gemm_tf32(const GroupedGemmParams& params, const GemmChoice& choice, cudaStream_t stream);

cudaError_t weight_grad_bf16(const WeightGradParams& params, const GemmChoice& choice, cudaStream_t stream);
cudaError_t weight_grad_fp16(const WeightGradParams& params, const GemmChoice& choice, cudaStream_t stream);
cudaError_t weight_grad_tf32(const WeightGradParams& params, const GemmChoice& choice, cudaStream_t stream);

}  // namespace scattermoe::kernels::sm80
