#include "../parallel_linear.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../checks.h"
#include "support.h"

namespace scattermoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct Layout {
    c10::SymInt top_k;
    bool grouped_in;
    bool grouped_out;
    std::optional<bool> allow_tf32;

    static auto fields(auto& self) { return std::tie(self.top_k, self.grouped_in, self.grouped_out, self.allow_tf32); }
};

at::Tensor forward_op(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const at::Tensor& slot_order, const at::Tensor& expert_offsets, const Layout& layout) {
    return parallel_linear(x, weight, bias, slot_order, expert_offsets, layout.top_k, layout.grouped_in,
                           layout.grouped_out, layout.allow_tf32);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_op(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& weight, const at::Tensor& slot_order,
                                                           const at::Tensor& expert_offsets, const Layout& layout,
                                                           std::array<bool, 3> output_mask) {
    return _parallel_linear_backward(grad, x, weight, slot_order, expert_offsets, layout.top_k, layout.grouped_in,
                                     layout.grouped_out, layout.allow_tf32, output_mask);
}

at::Tensor add_if_defined(const at::Tensor& a, const at::Tensor& b) {
    if (!a.defined()) return b;
    if (!b.defined()) return a;
    return a + b;
}

// y[s] = x[row(s)] W[e(s)]^T + b[e(s)]. With G = dL/dy:
//     dL/dx[r] = sum over the slots s of row r of G[s] W[e(s)]
//     dL/dW[e] = sum over the slots s of expert e of G[s]^T x[row(s)]
//     dL/db[e] = sum over the slots s of expert e of G[s]
// x is needed for dW alone, so it is not kept when the weight is frozen.
class ParallelLinear : public torch::autograd::Function<ParallelLinear> {
  public:
    static constexpr bool is_traceable = true;

    static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& weight,
                            const std::optional<Variable>& bias, const Variable& slot_order,
                            const Variable& expert_offsets, Layout layout) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        ctx->save_for_backward({weight.requires_grad() ? x : Variable(), weight, slot_order, expert_offsets});
        save_options(ctx, layout);
        return forward_op(x, weight, bias, slot_order, expert_offsets, layout);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const Variable& grad = grads[0];
        if (!grad.defined()) return variable_list(6);
        const auto saved = ctx->get_saved_variables();
        const Variable &weight = saved[1], &slot_order = saved[2], &expert_offsets = saved[3];
        const Variable x = saved[0].defined() ? saved[0] : empty_gradient(grad);
        // Without a bias the third input is slot_order, which never needs a gradient.
        const std::array<bool, 3> mask{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
        const auto [grad_x, grad_weight, grad_bias] =
            backward_op(grad, x, weight, slot_order, expert_offsets, load_options<Layout>(ctx), mask);
        return {mask[0] ? grad_x : Variable(),
                mask[1] ? grad_weight : Variable(),
                mask[2] ? grad_bias : Variable(),
                Variable(),
                Variable(),
                Variable()};
    }
};

// The backward op is linear in G, x and W alike, so its derivative is made of the same two ops. With X, V, c the
// gradients that arrive for dL/dx, dL/dW and dL/db:
//     for G: parallel_linear(X; W) + parallel_linear(x; V, c)
//     for x: the dL/dx of (G; V)
//     for W: the dL/dW of (G, X)
class ParallelLinearBackward : public torch::autograd::Function<ParallelLinearBackward> {
  public:
    static constexpr bool is_traceable = true;

    static variable_list forward(AutogradContext* ctx, const Variable& grad, const Variable& x, const Variable& weight,
                                 const Variable& slot_order, const Variable& expert_offsets, Layout layout,
                                 std::array<bool, 3> output_mask) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        ctx->set_materialize_grads(false);
        ctx->save_for_backward({grad, x, weight, slot_order, expert_offsets});
        save_options(ctx, layout);
        auto [grad_x, grad_weight, grad_bias] =
            backward_op(grad, x, weight, slot_order, expert_offsets, layout, output_mask);
        variable_list outputs{grad_x, grad_weight, grad_bias};
        variable_list not_computed;
        for (size_t i = 0; i < outputs.size(); ++i) {
            if (!output_mask[i]) not_computed.push_back(outputs[i]);
        }
        ctx->mark_non_differentiable(not_computed);
        return outputs;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const auto saved = ctx->get_saved_variables();
        const Variable &grad = saved[0], &x = saved[1], &weight = saved[2], &slot_order = saved[3],
                       &expert_offsets = saved[4];
        const Layout layout = load_options<Layout>(ctx);
        const Variable &for_x = grads[0], &for_weight = grads[1], &for_bias = grads[2];

        Variable grad_grad, grad_x, grad_weight;
        if (ctx->needs_input_grad(0)) {
            if (for_x.defined()) {
                grad_grad = forward_op(for_x, weight, std::nullopt, slot_order, expert_offsets, layout);
            }
            if (for_weight.defined()) {
                grad_grad = add_if_defined(
                    grad_grad, forward_op(x, for_weight, as_optional(for_bias), slot_order, expert_offsets, layout));
            } else if (for_bias.defined()) {
                // The bias alone: a product with no inner dimension.
                const auto no_columns = at::empty_symint({slot_order.sym_size(0) / layout.top_k, 0}, weight.options());
                grad_grad = add_if_defined(grad_grad, forward_op(no_columns, weight.slice(2, 0, 0), for_bias,
                                                                 slot_order, expert_offsets, layout));
            }
        }
        if (ctx->needs_input_grad(1) && for_weight.defined()) {
            grad_x =
                std::get<0>(backward_op(grad, x, for_weight, slot_order, expert_offsets, layout, {true, false, false}));
        }
        if (ctx->needs_input_grad(2) && for_x.defined()) {
            grad_weight =
                std::get<1>(backward_op(grad, for_x, weight, slot_order, expert_offsets, layout, {false, true, false}));
        }
        return {grad_grad, grad_x, grad_weight, Variable(), Variable(), Variable(), Variable()};
    }
};

at::Tensor parallel_linear_autograd(const at::Tensor& x, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias, const at::Tensor& slot_order,
                                    const at::Tensor& expert_offsets, c10::SymInt top_k, bool grouped_in,
                                    bool grouped_out, std::optional<bool> allow_tf32) {
    Layout layout{std::move(top_k), grouped_in, grouped_out, allow_tf32};
    if (!any_has_derivative(x, weight, bias)) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        return forward_op(x, weight, bias, slot_order, expert_offsets, layout);
    }
    return ParallelLinear::apply(x, weight, bias, slot_order, expert_offsets, std::move(layout));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> parallel_linear_backward_autograd(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& slot_order,
    const at::Tensor& expert_offsets, c10::SymInt top_k, bool grouped_in, bool grouped_out,
    std::optional<bool> allow_tf32, std::array<bool, 3> output_mask) {
    Layout layout{std::move(top_k), grouped_in, grouped_out, allow_tf32};
    if (!any_has_derivative(grad, x, weight)) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        return backward_op(grad, x, weight, slot_order, expert_offsets, layout, output_mask);
    }
    auto grads =
        ParallelLinearBackward::apply(grad, x, weight, slot_order, expert_offsets, std::move(layout), output_mask);
    return {grads[0], grads[1], grads[2]};
}

TORCH_LIBRARY_IMPL(scattermoe, Autograd, m) {
    m.impl("parallel_linear", TORCH_FN(parallel_linear_autograd));
    m.impl("_parallel_linear_backward", TORCH_FN(parallel_linear_backward_autograd));
}

}  // namespace

}  // namespace scattermoe
