#include "up_projection.h"

#include "activation_kernels.h"
#include "hopper.h"

namespace scattermoe::kernels {

namespace {

sm90::GluGemmParams glu_gemm_params(const UpProjectionParams& p) {
    return {p.gemm, p.activation, p.hidden};
}

}  // namespace

bool up_projection_is_fused(const UpProjectionParams& p) {
    return takes_hopper(glu_gemm_params(p));
}

cudaError_t up_projection(const UpProjectionParams& p, [[maybe_unused]] bool fused, cudaStream_t stream) {
    if (p.gemm.num_slots == 0 || p.gemm.n == 0) return cudaSuccess;
#if defined(SCATTERMOE_SM90)
    if (fused) return sm90::glu_gemm(glu_gemm_params(p), stream);
#endif
    const cudaError_t error = grouped_gemm(p.gemm, stream);
    if (error != cudaSuccess) return error;
    ActivationForwardParams activation;
    activation.dtype = p.gemm.dtype;
    activation.activation = p.activation;
    activation.z = p.gemm.out;
    activation.hidden = p.hidden;
    activation.rows = p.gemm.num_slots;
    activation.width = is_gated(p.activation.activation) ? p.gemm.n / 2 : p.gemm.n;
    return activation_forward(activation, stream);
}

}  // namespace scattermoe::kernels
