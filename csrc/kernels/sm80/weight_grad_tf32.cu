#include "instances.h"
#include "weight_grad_kernel.h"

namespace scattermoe::kernels::sm80 {

cudaError_t weight_grad_tf32(const WeightGradParams& params, const GemmChoice& choice, cudaStream_t stream) {
    return weight_grad<float>(params, choice, stream);
}

}  // namespace scattermoe::kernels::sm80
