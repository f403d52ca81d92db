#include "../moe_mlp.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "../parallel_linear.h"
#include "support.h"

namespace scattermoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct Options {
    std::string activation;
    std::string glu_layout;
    double alpha;
    double limit;
    std::optional<bool> allow_tf32;
    bool recompute = false;
    bool has_b_up = false;
    bool has_hooks = false;  // what was saved went through hooks on saved tensors

    static auto fields(auto& self) {
        return std::tie(self.activation, self.glu_layout, self.alpha, self.limit, self.allow_tf32, self.recompute,
                        self.has_b_up, self.has_hooks);
    }
};

// Whether backward may write dz over z: nobody will read z again, and it is memory that nobody else has seen. With
// `recompute` that is so by itself. A z that was kept must not be needed by a second backward pass through this node,
// and the node must be its only owner: a hook on saved tensors may hand out a tensor that somebody else holds, a
// dispatch mode may have kept it. In a trace a change in place would only be undone again.
bool may_overwrite(const Variable& z, const Variable& grad, const Options& options) {
    if (any_has_derivative(z, grad) || at::GradMode::is_enabled() || at::isTensorSubclassLike(z)) return false;
    constexpr size_t kOwners = 2;  // the node, and the variable that it was unpacked to
    return options.recompute || (!torch::autograd::get_current_graph_task_keep_graph() && !options.has_hooks &&
                                 z.use_count() == kOwners && z.storage().use_count() == 1);
}

// With z = W_up x[t] + b_up the pre-activations of a slot, A = act(z), y = W_down A + b_down and g its gate, out[t]
// sums g y over the slots of t. With G = dL/dout and dA' = G[t] W_down:
//     dL/dg      = <G[t], y> = <dA', A> + <G[t], b_down>     neither y nor its gradient is ever needed
//     dz         = g dA' act'(z)
//     dL/dW_down = sum over the expert's slots of G[t]^T (g A)       dL/db_down = sum of g G[t]
//     dL/dW_up   = sum over the expert's slots of dz^T x[t]          dL/db_up   = sum of dz
//     dL/dx[t]   = sum over the token's slots of dz W_up
// so x, z, the gates, the routing and the weights are all that backward reads, and x only for dL/dW_up. With
// `recompute`, x and b_up are kept instead of z, which is the parallel_linear that the forward pass began with.
class MoeMlp : public torch::autograd::Function<MoeMlp> {
  public:
    static constexpr bool is_traceable = true;
    static constexpr size_t kNumArguments = 10;

    static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& w_up,
                            const std::optional<Variable>& b_up, const Variable& w_down,
                            const std::optional<Variable>& b_down, const Variable& gates, const Variable& slot_order,
                            const Variable& slot_position, const Variable& expert_offsets, Options options) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        Variable y, z;
        if (options.recompute) {
            y = moe_mlp(x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets,
                        options.activation, options.glu_layout, options.alpha, options.limit, options.allow_tf32);
        } else {
            std::tie(y, z) = _moe_mlp_forward(x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position,
                                              expert_offsets, options.activation, options.glu_layout, options.alpha,
                                              options.limit, options.allow_tf32);
        }
        const bool x_is_read = options.recompute || w_up.requires_grad();
        ctx->save_for_backward({x_is_read ? x : Variable(), w_up,
                                options.recompute ? b_up.value_or(Variable()) : Variable(), w_down,
                                b_down.value_or(Variable()), gates, z, slot_order, slot_position, expert_offsets});
        options.has_b_up = has_value(b_up);
        options.has_hooks = !at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
        save_options(ctx, options);
        return y;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const Variable& grad = grads[0];
        if (!grad.defined()) return variable_list(kNumArguments);
        const auto saved = ctx->get_saved_variables();
        const Variable &w_up = saved[1], &b_up = saved[2], &w_down = saved[3], &b_down = saved[4], &gates = saved[5],
                       &slot_order = saved[7], &slot_position = saved[8], &expert_offsets = saved[9];
        const Options options = load_options<Options>(ctx);
        const Variable x = saved[0].defined() ? saved[0] : empty_gradient(grad);
        const Variable recomputed_z =
            options.recompute
                ? parallel_linear(x, w_up, as_optional(b_up), slot_order, expert_offsets, slot_position.sym_size(1),
                                  /*grouped_in=*/false, /*grouped_out=*/true, options.allow_tf32)
                : Variable();
        const Variable& z = options.recompute ? recomputed_z : saved[6];

        // Autograd numbers the inputs that are tensors, so a bias that is not there shifts those behind it.
        size_t edge = 0;
        const auto next_needs_grad = [&](bool present) { return present && ctx->needs_input_grad(edge++); };
        std::array<bool, kNumMoeMlpGrads> mask{};
        mask[kGradX] = next_needs_grad(true);
        mask[kGradWUp] = next_needs_grad(true);
        mask[kGradBUp] = next_needs_grad(options.has_b_up);
        mask[kGradWDown] = next_needs_grad(true);
        mask[kGradBDown] = next_needs_grad(b_down.defined());
        mask[kGradGates] = next_needs_grad(true);

        const auto run = [&](auto& op) {
            return op(grad, x, w_up, w_down, as_optional(b_down), gates, z, slot_order, slot_position, expert_offsets,
                      options.activation, options.glu_layout, options.alpha, options.limit, options.allow_tf32, mask);
        };
        MoeMlpGrads gradients;
        if (may_overwrite(z, grad, options)) {
            at::AutoDispatchBelowADInplaceOrView below_autograd;
            // So that a backward pass that is tried again, after an error in this one, says what happened.
            z.unsafeGetTensorImpl()->bump_version();
            gradients = run(_moe_mlp_backward_over_z);
        } else {
            gradients = run(_moe_mlp_backward);
        }
        const auto& [grad_x, grad_w_up, grad_b_up, grad_w_down, grad_b_down, grad_gates] = gradients;

        variable_list result(kNumArguments);
        if (mask[kGradX]) result[0] = grad_x;
        if (mask[kGradWUp]) result[1] = grad_w_up;
        if (mask[kGradBUp]) result[2] = grad_b_up;
        if (mask[kGradWDown]) result[3] = grad_w_down;
        if (mask[kGradBDown]) result[4] = grad_b_down;
        if (mask[kGradGates]) result[5] = grad_gates;
        return result;
    }
};

// The first derivative, as a node of the graph that says no to a second one.
class MoeMlpBackward : public torch::autograd::Function<MoeMlpBackward> {
  public:
    static constexpr bool is_traceable = true;

    static variable_list forward(AutogradContext* ctx, const Variable& grad, const Variable& x, const Variable& w_up,
                                 const Variable& w_down, const std::optional<Variable>& b_down, const Variable& gates,
                                 const Variable& z, const Variable& slot_order, const Variable& slot_position,
                                 const Variable& expert_offsets, Options options,
                                 std::array<bool, kNumMoeMlpGrads> output_mask) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        auto [grad_x, grad_w_up, grad_b_up, grad_w_down, grad_b_down, grad_gates] = _moe_mlp_backward(
            grad, x, w_up, w_down, b_down, gates, z, slot_order, slot_position, expert_offsets, options.activation,
            options.glu_layout, options.alpha, options.limit, options.allow_tf32, output_mask);
        variable_list outputs{grad_x, grad_w_up, grad_b_up, grad_w_down, grad_b_down, grad_gates};
        variable_list not_computed;
        for (size_t i = 0; i < outputs.size(); ++i) {
            if (!output_mask[i]) not_computed.push_back(outputs[i]);
        }
        ctx->mark_non_differentiable(not_computed);
        return outputs;
    }

    static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*grads*/) {
        TORCH_CHECK(false,
                    "scattermoe::moe_mlp does not support second derivatives; build the layer from parallel_linear and "
                    "combine, which do");
    }
};

at::Tensor moe_mlp_autograd(const at::Tensor& x, const at::Tensor& w_up, const std::optional<at::Tensor>& b_up,
                            const at::Tensor& w_down, const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                            const at::Tensor& slot_order, const at::Tensor& slot_position,
                            const at::Tensor& expert_offsets, std::string_view activation, std::string_view glu_layout,
                            double alpha, double limit, std::optional<bool> allow_tf32, bool recompute) {
    if (!any_has_derivative(x, w_up, b_up, w_down, b_down, gates)) {
        // Nothing will be differentiated: the op that does not keep z.
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        return moe_mlp(x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets, activation,
                       glu_layout, alpha, limit, allow_tf32);
    }
    return MoeMlp::apply(
        x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets,
        Options{std::string(activation), std::string(glu_layout), alpha, limit, allow_tf32, recompute});
}

MoeMlpGrads moe_mlp_backward_autograd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& w_up,
                                      const at::Tensor& w_down, const std::optional<at::Tensor>& b_down,
                                      const at::Tensor& gates, const at::Tensor& z, const at::Tensor& slot_order,
                                      const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                                      std::string_view activation, std::string_view glu_layout, double alpha,
                                      double limit, std::optional<bool> allow_tf32,
                                      std::array<bool, kNumMoeMlpGrads> output_mask) {
    if (!any_has_derivative(grad, x, w_up, w_down, b_down, gates, z)) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        return _moe_mlp_backward(grad, x, w_up, w_down, b_down, gates, z, slot_order, slot_position, expert_offsets,
                                 activation, glu_layout, alpha, limit, allow_tf32, output_mask);
    }
    auto grads = MoeMlpBackward::apply(
        grad, x, w_up, w_down, b_down, gates, z, slot_order, slot_position, expert_offsets,
        Options{std::string(activation), std::string(glu_layout), alpha, limit, allow_tf32}, output_mask);
    return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
}

TORCH_LIBRARY_IMPL(scattermoe, Autograd, m) {
    m.impl("moe_mlp", TORCH_FN(moe_mlp_autograd));
    m.impl("_moe_mlp_backward", TORCH_FN(moe_mlp_backward_autograd));
}

}  // namespace

}  // namespace scattermoe
