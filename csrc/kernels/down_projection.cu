#include "down_projection.h"

#include "gate_grad.h"
#include "select.h"
#if defined(SCATTERMOE_SM90)
#include "device.h"
#include "sm90/sm90.h"
#endif

namespace scattermoe::kernels {

#if defined(SCATTERMOE_SM90)
namespace {

sm90::GluBackwardGemmParams glu_backward_params(const DownProjectionBackwardParams& p) {
    const ActivationBackwardParams& activation = p.activation;
    return {p.gemm,
            activation.activation,
            activation.z,
            static_cast<const float*>(activation.gates),
            activation.slot_order,
            activation.grad_z,
            activation.gated_hidden,
            p.gate_partials};
}

cudaError_t fused(const DownProjectionBackwardParams& p, cudaStream_t stream) {
    const ActivationBackwardParams& activation = p.activation;
    const cudaError_t error = sm90::glu_backward_gemm(glu_backward_params(p), stream);
    if (error != cudaSuccess || activation.grad_gates == nullptr) return error;
    GateGradParams gates;
    gates.dtype = activation.dtype;
    gates.gate_partials = p.gate_partials;
    gates.parts = gate_parts(p);
    gates.slot_order = activation.slot_order;
    gates.expert_offsets = activation.expert_offsets;
    gates.num_experts = activation.num_experts;
    gates.num_slots = activation.num_slots;
    gates.grad_gates = static_cast<float*>(activation.grad_gates);
    gates.grad = activation.grad;
    gates.bias = activation.bias;
    gates.top_k = activation.top_k;
    gates.out_features = activation.out_features;
    return gate_grad(gates, stream);
}

}  // namespace
#endif

bool down_projection_backward_is_fused([[maybe_unused]] const DownProjectionBackwardParams& p) {
#if defined(SCATTERMOE_SM90)
    int arch = 0;
    const bool hopper = code_architecture(arch) == cudaSuccess && arch == 90 && sm90::is_enabled() &&
                        sm90::can_run(glu_backward_params(p));
    const GemmQuery query{p.gemm.dtype,       p.gemm.allow_tf32,         arch,     true,  p.gemm.num_slots,
                          p.gemm.num_experts, /*weight_gradient=*/false, p.gemm.n, hopper};
    return hopper && select_gemm(query).engine == GemmEngine::kHopper;
#else
    return false;
#endif
}

int32_t gate_parts([[maybe_unused]] const DownProjectionBackwardParams& p) {
#if defined(SCATTERMOE_SM90)
    if (p.activation.grad_gates != nullptr && down_projection_backward_is_fused(p)) return sm90::gate_parts(p.gemm);
#endif
    return 0;
}

cudaError_t down_projection_backward(const DownProjectionBackwardParams& p, cudaStream_t stream) {
#if defined(SCATTERMOE_SM90)
    if (p.gemm.num_slots > 0 && down_projection_backward_is_fused(p)) return fused(p, stream);
#endif
    const cudaError_t error = grouped_gemm(p.gemm, stream);
    if (error != cudaSuccess) return error;
    ActivationBackwardParams activation = p.activation;
    activation.grad_hidden = p.gemm.out;
    return activation_backward(activation, stream);
}

}  // namespace scattermoe::kernels
