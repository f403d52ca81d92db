#include "instances.h"
#include "simt_kernels.h"

namespace scattermoe::kernels::simt {

cudaError_t grouped_gemm_fp32(const GroupedGemmParams& params, cudaStream_t stream) {
    return grouped_gemm<float>(params, stream);
}

cudaError_t weight_grad_fp32(const WeightGradParams& params, cudaStream_t stream) {
    return weight_grad<float>(params, stream);
}

}  // namespace scattermoe::kernels::simt
