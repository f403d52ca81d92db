#include "../combine.h"

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

struct Options {
    bool grouped;

    static auto fields(auto& self) { return std::tie(self.grouped); }
};

// y[t] = sum_j g[t, j] r(t, j), with r(t, j) the row of slot (t, j). With G = dL/dy:
//     dL/dr(t, j) = g[t, j] G[t]
//     dL/dg[t, j] = <G[t], r(t, j)>
// The rows are needed for the gates' gradient alone.
class Combine : public torch::autograd::Function<Combine> {
  public:
    static constexpr bool is_traceable = true;

    static Variable forward(AutogradContext* ctx, const Variable& rows, const std::optional<Variable>& gates,
                            const Variable& slot_order, const Variable& slot_position, bool grouped) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        const bool gates_need_grad = has_value(gates) && gates->requires_grad();
        ctx->save_for_backward(
            {gates_need_grad ? rows : Variable(), gates.value_or(Variable()), slot_order, slot_position});
        save_options(ctx, Options{grouped});
        return combine(rows, gates, slot_order, slot_position, grouped);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const Variable& grad = grads[0];
        if (!grad.defined()) return variable_list(5);
        const auto saved = ctx->get_saved_variables();
        const Variable &gates = saved[1], &slot_order = saved[2], &slot_position = saved[3];
        const Variable rows = saved[0].defined() ? saved[0] : empty_gradient(grad);
        const std::array<bool, 2> mask{ctx->needs_input_grad(0), gates.defined() && ctx->needs_input_grad(1)};
        const auto [grad_rows, grad_gates] = _combine_backward(grad, rows, as_optional(gates), slot_order,
                                                               slot_position, load_options<Options>(ctx).grouped, mask);
        return {mask[0] ? grad_rows : Variable(), mask[1] ? grad_gates : Variable(), Variable(), Variable(),
                Variable()};
    }
};

// The backward op is linear in G, rows and gates alike, so its derivative is made of the same two ops. With R, c the
// gradients that arrive for dL/drows and dL/dgates:
//     for G:     combine(R, g) + combine(rows, c)
//     for rows:  the dL/drows of (G, c)
//     for gates: the dL/dgates of (G, R)
class CombineBackward : public torch::autograd::Function<CombineBackward> {
  public:
    static constexpr bool is_traceable = true;

    static variable_list forward(AutogradContext* ctx, const Variable& grad, const Variable& rows,
                                 const std::optional<Variable>& gates, const Variable& slot_order,
                                 const Variable& slot_position, bool grouped, std::array<bool, 2> output_mask) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        ctx->set_materialize_grads(false);
        ctx->save_for_backward({grad, rows, gates.value_or(Variable()), slot_order, slot_position});
        save_options(ctx, Options{grouped});
        auto [grad_rows, grad_gates] =
            _combine_backward(grad, rows, gates, slot_order, slot_position, grouped, output_mask);
        variable_list not_computed;
        if (!output_mask[0]) not_computed.push_back(grad_rows);
        if (!output_mask[1]) not_computed.push_back(grad_gates);
        ctx->mark_non_differentiable(not_computed);
        return {grad_rows, grad_gates};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const auto saved = ctx->get_saved_variables();
        const Variable &grad = saved[0], &rows = saved[1], &gates = saved[2], &slot_order = saved[3],
                       &slot_position = saved[4];
        const bool grouped = load_options<Options>(ctx).grouped;
        const Variable &for_rows = grads[0], &for_gates = grads[1];

        Variable grad_grad, grad_rows, grad_gates;
        if (ctx->needs_input_grad(0)) {
            if (for_rows.defined()) {
                grad_grad = combine(for_rows, as_optional(gates), slot_order, slot_position, grouped);
            }
            if (for_gates.defined()) {
                const Variable from_gates = combine(rows, for_gates, slot_order, slot_position, grouped);
                grad_grad = grad_grad.defined() ? grad_grad + from_gates : from_gates;
            }
        }
        if (ctx->needs_input_grad(1) && for_gates.defined()) {
            grad_rows = std::get<0>(
                _combine_backward(grad, rows, for_gates, slot_order, slot_position, grouped, {true, false}));
        }
        if (gates.defined() && ctx->needs_input_grad(2) && for_rows.defined()) {
            grad_gates = std::get<1>(
                _combine_backward(grad, for_rows, gates, slot_order, slot_position, grouped, {false, true}));
        }
        return {grad_grad, grad_rows, grad_gates, Variable(), Variable(), Variable(), Variable()};
    }
};

at::Tensor combine_autograd(const at::Tensor& rows, const std::optional<at::Tensor>& gates,
                            const at::Tensor& slot_order, const at::Tensor& slot_position, bool grouped) {
    if (!any_has_derivative(rows, gates)) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        return combine(rows, gates, slot_order, slot_position, grouped);
    }
    return Combine::apply(rows, gates, slot_order, slot_position, grouped);
}

std::tuple<at::Tensor, at::Tensor> combine_backward_autograd(const at::Tensor& grad, const at::Tensor& rows,
                                                             const std::optional<at::Tensor>& gates,
                                                             const at::Tensor& slot_order,
                                                             const at::Tensor& slot_position, bool grouped,
                                                             std::array<bool, 2> output_mask) {
    if (!any_has_derivative(grad, rows, gates)) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        return _combine_backward(grad, rows, gates, slot_order, slot_position, grouped, output_mask);
    }
    auto grads = CombineBackward::apply(grad, rows, gates, slot_order, slot_position, grouped, output_mask);
    return {grads[0], grads[1]};
}

TORCH_LIBRARY_IMPL(scattermoe, Autograd, m) {
    m.impl("combine", TORCH_FN(combine_autograd));
    m.impl("_combine_backward", TORCH_FN(combine_backward_autograd));
}

}  // namespace

}  // namespace scattermoe
