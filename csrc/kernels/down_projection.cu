#include "down_projection.h"

#include "gate_grad.h"
#include "hopper.h"

namespace scattermoe::kernels {

namespace {

// Whether the fused kernel writes the gates' gradient itself, not in parts.
bool writes_gate_grad(const DownProjectionBackwardParams& p) {
    return p.activation.grad_gates != nullptr && p.activation.bias == nullptr && sm90::gate_parts(p.gemm.n) == 1;
}

sm90::GluBackwardGemmParams glu_backward_params(const DownProjectionBackwardParams& p) {
    const ActivationBackwardParams& activation = p.activation;
    return {p.gemm,
            activation.activation,
            activation.z,
            static_cast<const float*>(activation.gates),
            activation.slot_order,
            activation.grad_z,
            activation.gated_hidden,
            p.gate_partials,
            writes_gate_grad(p) ? static_cast<float*>(activation.grad_gates) : nullptr};
}

#if defined(SCATTERMOE_SM90)
cudaError_t launch_fused(const DownProjectionBackwardParams& p, cudaStream_t stream) {
    const ActivationBackwardParams& activation = p.activation;
    const cudaError_t error = sm90::glu_backward_gemm(glu_backward_params(p), stream);
    if (error != cudaSuccess || activation.grad_gates == nullptr || writes_gate_grad(p)) return error;
    GateGradParams gates;
    gates.dtype = activation.dtype;
    gates.gate_partials = p.gate_partials;
    gates.parts = sm90::gate_parts(p.gemm.n);
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
#endif

}  // namespace

bool down_projection_backward_is_fused(const DownProjectionBackwardParams& p) {
    return takes_hopper(glu_backward_params(p));
}

int32_t gate_parts([[maybe_unused]] const DownProjectionBackwardParams& p, [[maybe_unused]] bool fused) {
#if defined(SCATTERMOE_SM90)
    if (fused && p.activation.grad_gates != nullptr && !writes_gate_grad(p)) return sm90::gate_parts(p.gemm.n);
#endif
    return 0;
}

cudaError_t down_projection_backward(const DownProjectionBackwardParams& p, [[maybe_unused]] bool fused,
                                     cudaStream_t stream) {
#if defined(SCATTERMOE_SM90)
    if (fused && p.gemm.num_slots > 0) return launch_fused(p, stream);
#endif
    const cudaError_t error = grouped_gemm(p.gemm, stream);
    if (error != cudaSuccess) return error;
    ActivationBackwardParams activation = p.activation;
    activation.grad_hidden = p.gemm.out;
    return activation_backward(activation, stream);
}

}  // namespace scattermoe::kernels
