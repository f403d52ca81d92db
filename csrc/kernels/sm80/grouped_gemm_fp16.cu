#include "grouped_gemm_kernel.h"
#include "instances.h"

namespace scattermoe::kernels::sm80 {

cudaError_t grouped_gemm_fp16(const GroupedGemmParams& params, const GemmChoice& choice, cudaStream_t stream) {
    return grouped_gemm<__half>(params, choice, stream);
}

}  // namespace scattermoe::kernels::sm80
