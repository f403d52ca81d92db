#include "up_projection.h"

#include "activation_kernels.h"
#include "device.h"
#include "select.h"
#if defined(SCATTERMOE_SM90)
#include "sm90/sm90.h"
#endif

namespace scattermoe::kernels {

#if defined(SCATTERMOE_SM90)
namespace {

sm90::GluGemmParams glu_gemm_params(const UpProjectionParams& p) {
    return {p.gemm, p.activation, p.hidden};
}

}  // namespace
#endif

bool up_projection_is_fused([[maybe_unused]] const UpProjectionParams& p) {
#if defined(SCATTERMOE_SM90)
    int arch = 0;
    const bool hopper =
        code_architecture(arch) == cudaSuccess && arch == 90 && sm90::is_enabled() && sm90::can_run(glu_gemm_params(p));
    const GemmQuery query{p.gemm.dtype,       p.gemm.allow_tf32,         arch,     true,  p.gemm.num_slots,
                          p.gemm.num_experts, /*weight_gradient=*/false, p.gemm.n, hopper};
    return hopper && select_gemm(query).engine == GemmEngine::kHopper;
#else
    return false;
#endif
}

cudaError_t up_projection(const UpProjectionParams& p, cudaStream_t stream) {
    if (p.gemm.num_slots == 0 || p.gemm.n == 0) return cudaSuccess;
#if defined(SCATTERMOE_SM90)
    if (up_projection_is_fused(p)) return sm90::glu_gemm(glu_gemm_params(p), stream);
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
