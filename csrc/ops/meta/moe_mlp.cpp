#include "../moe_mlp.h"

#include <torch/library.h>

#include "../checks.h"

namespace scattermoe {

namespace {

at::Tensor moe_mlp_meta(const at::Tensor& x, const at::Tensor& w_up, const std::optional<at::Tensor>& b_up,
                        const at::Tensor& w_down, const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                        const at::Tensor& slot_order, const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                        std::string_view activation, std::string_view glu_layout, double alpha, double limit,
                        std::optional<bool> /*allow_tf32*/, bool /*recompute*/) {
    check_moe_mlp(x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets, activation,
                  glu_layout);
    parse_activation_params("moe_mlp", activation, glu_layout, alpha, limit);
    return at::empty_symint({x.sym_size(0), w_down.sym_size(1)}, x.options());
}

std::tuple<at::Tensor, at::Tensor> moe_mlp_forward_meta(
    const at::Tensor& x, const at::Tensor& w_up, const std::optional<at::Tensor>& b_up, const at::Tensor& w_down,
    const std::optional<at::Tensor>& b_down, const at::Tensor& gates, const at::Tensor& slot_order,
    const at::Tensor& slot_position, const at::Tensor& expert_offsets, std::string_view activation,
    std::string_view glu_layout, double alpha, double limit, std::optional<bool> allow_tf32) {
    return {moe_mlp_meta(x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets, activation,
                         glu_layout, alpha, limit, allow_tf32, /*recompute=*/false),
            at::empty_symint({slot_order.sym_size(0), w_up.sym_size(1)}, x.options())};
}

MoeMlpGrads moe_mlp_backward_meta(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& w_up,
                                  const at::Tensor& w_down, const std::optional<at::Tensor>& b_down,
                                  const at::Tensor& gates, const at::Tensor& z, const at::Tensor& slot_order,
                                  const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                                  std::string_view activation, std::string_view glu_layout, double alpha, double limit,
                                  std::optional<bool> /*allow_tf32*/, std::array<bool, kNumMoeMlpGrads> output_mask) {
    check_moe_mlp_backward(grad, x, w_up, w_down, b_down, gates, z, slot_order, slot_position, expert_offsets,
                           activation, glu_layout, output_mask);
    parse_activation_params("_moe_mlp_backward", activation, glu_layout, alpha, limit);
    const auto options = grad.options();
    const auto num_experts = w_up.sym_size(0);
    return {
        output_mask[kGradX] ? at::empty_symint({grad.sym_size(0), w_up.sym_size(2)}, options) : empty_gradient(grad),
        output_mask[kGradWUp] ? at::empty_like(w_up) : empty_gradient(grad),
        output_mask[kGradBUp] ? at::empty_symint({num_experts, w_up.sym_size(1)}, options) : empty_gradient(grad),
        output_mask[kGradWDown] ? at::empty_like(w_down) : empty_gradient(grad),
        output_mask[kGradBDown] ? at::empty_symint({num_experts, w_down.sym_size(1)}, options) : empty_gradient(grad),
        output_mask[kGradGates] ? at::empty_symint(gates.sym_sizes(), gates.options()) : empty_gradient(grad)};
}

TORCH_LIBRARY_IMPL(scattermoe, Meta, m) {
    m.impl("moe_mlp", TORCH_FN(moe_mlp_meta));
    m.impl("_moe_mlp_forward", TORCH_FN(moe_mlp_forward_meta));
    m.impl("_moe_mlp_backward", TORCH_FN(moe_mlp_backward_meta));
    m.impl("_moe_mlp_backward_over_z", TORCH_FN(moe_mlp_backward_meta));
}

}  // namespace

}  // namespace scattermoe
