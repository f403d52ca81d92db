#include "grouped_gemm_kernel.h"
#include "instances.h"

namespace scattermoe::kernels::sm80 {

cudaError_t grouped_gemm_tf32(const GroupedGemmParams& params, const GemmChoice& choice, cudaStream_t stream) {
    return grouped_gemm<float>(params, choice, stream);
}

}  // namespace scattermoe::kernels::sm80
