#include "instances.h"
#include "simt_kernels.h"

namespace scattermoe::kernels::simt {

cudaError_t grouped_gemm_fp64(const GroupedGemmParams& params, cudaStream_t stream) {
    return grouped_gemm<double>(params, stream);
}

cudaError_t weight_grad_fp64(const WeightGradParams& params, cudaStream_t stream) {
    return weight_grad<double>(params, stream);
}

}  // namespace scattermoe::kernels::simt
