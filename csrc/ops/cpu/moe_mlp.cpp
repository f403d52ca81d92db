#include "../moe_mlp.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "../combine.h"
#include "activation.h"
#include "expert_schedule.h"
#include "grouping.h"
#include "matmul.h"
#include "memory.h"
#include "row_kernels.h"
#include "rows.h"

namespace scattermoe {

namespace {

std::optional<at::Tensor> select_expert(const std::optional<at::Tensor>& bias, int64_t expert) {
    return has_value(bias) ? std::optional<at::Tensor>(bias->select(0, expert)) : std::nullopt;
}

// Writes the pre-activations to z where it is defined, and returns y.
at::Tensor forward(const at::Tensor& x, const at::Tensor& w_up, const std::optional<at::Tensor>& b_up,
                   const at::Tensor& w_down, const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                   const at::Tensor& slot_order, const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                   const ActivationParams& params, const at::Tensor& z) {
    const cpu::Grouping grouping("moe_mlp", slot_order, expert_offsets);
    const int64_t top_k = slot_position.size(1);
    const int64_t in_features = w_up.size(2), z_features = w_up.size(1);
    const int64_t hidden = w_down.size(2), out_features = w_down.size(1);
    const at::Tensor rows = cpu::with_contiguous_rows(x);
    at::Tensor slot_y = cpu::empty({grouping.num_slots(), out_features}, x.options());

    cpu::for_each_expert(grouping, x.options(), [&](int64_t expert, cpu::Scratch& scratch) {
        const int64_t begin = grouping.begin(expert), count = grouping.end(expert) - begin;
        if (count == 0) return;
        scratch.reset(count * (in_features + hidden + (z.defined() ? 0 : z_features)));
        const at::Tensor expert_x = scratch.take(count, in_features);
        const at::Tensor expert_z = z.defined() ? z.narrow(0, begin, count) : scratch.take(count, z_features);
        const at::Tensor expert_h = scratch.take(count, hidden);
        cpu::gather_rows(expert_x, rows, grouping.slots(begin), top_k);
        cpu::matmul(expert_z, expert_x, w_up.select(0, expert).t(), select_expert(b_up, expert));
        cpu::apply_activation(params, expert_h, expert_z);
        cpu::matmul(slot_y.narrow(0, begin, count), expert_h, w_down.select(0, expert).t(),
                    select_expert(b_down, expert));
    });
    if (z.defined()) z.narrow(0, grouping.num_rows(), grouping.num_slots() - grouping.num_rows()).zero_();
    return combine(slot_y, gates, slot_order, slot_position, /*grouped=*/true);
}

at::Tensor moe_mlp_cpu(const at::Tensor& x, const at::Tensor& w_up, const std::optional<at::Tensor>& b_up,
                       const at::Tensor& w_down, const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                       const at::Tensor& slot_order, const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                       std::string_view activation, std::string_view glu_layout, double alpha, double limit,
                       std::optional<bool> /*allow_tf32*/, bool /*recompute*/) {
    check_moe_mlp(x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets, activation,
                  glu_layout);
    return forward(x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets,
                   parse_activation_params("moe_mlp", activation, glu_layout, alpha, limit), /*z=*/at::Tensor());
}

std::tuple<at::Tensor, at::Tensor> moe_mlp_forward_cpu(const at::Tensor& x, const at::Tensor& w_up,
                                                       const std::optional<at::Tensor>& b_up, const at::Tensor& w_down,
                                                       const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                                                       const at::Tensor& slot_order, const at::Tensor& slot_position,
                                                       const at::Tensor& expert_offsets, std::string_view activation,
                                                       std::string_view glu_layout, double alpha, double limit,
                                                       std::optional<bool> /*allow_tf32*/) {
    check_moe_mlp(x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets, activation,
                  glu_layout);
    at::Tensor z = cpu::empty({slot_order.size(0), w_up.size(1)}, x.options());
    at::Tensor y = forward(x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets,
                           parse_activation_params("moe_mlp", activation, glu_layout, alpha, limit), z);
    return {y, z};
}

// From the rows of one expert: dz = gate * dh * act'(z), gated_h = gate * act(z) (where defined), and the gate's
// gradient <dh, act(z)> + <grad, b_down> at the row's slot.
template <typename T>
void backward_rows(const ActivationParams& params, const at::Tensor& dz, const at::Tensor& gated_h, const at::Tensor& z,
                   const at::Tensor& dh, const at::Tensor& grad, const std::optional<at::Tensor>& b_down,
                   const cpu::Compute<T>* gates, const int32_t* slots, cpu::Compute<T>* grad_gates) {
    const int64_t hidden = dh.size(1), z_width = z.size(1), grad_width = grad.size(1);
    T* dz_ = dz.mutable_data_ptr<T>();
    T* h_ = gated_h.defined() ? gated_h.mutable_data_ptr<T>() : nullptr;
    const T* z_ = z.const_data_ptr<T>();
    const T* dh_ = dh.const_data_ptr<T>();
    const T* grad_ = grad.const_data_ptr<T>();
    const T* bias = b_down.has_value() && grad_gates ? b_down->const_data_ptr<T>() : nullptr;
    at::parallel_for(0, z.size(0), cpu::rows_per_task(z_width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int32_t slot = slots[i];
            const cpu::Compute<T> dgate =
                cpu::activation_backward<T>(params, dz_ + i * z_width, h_ ? h_ + i * hidden : nullptr, z_ + i * z_width,
                                            dh_ + i * hidden, gates[slot], hidden);
            if (!grad_gates) continue;
            grad_gates[slot] = bias ? dgate + cpu::dot<T>(grad_ + i * grad_width, bias, grad_width) : dgate;
        }
    });
}

// out = sum_i gates[slots[i]] * rows[i]
template <typename T>
void gated_sum(const at::Tensor& out, const at::Tensor& rows, const cpu::Compute<T>* gates, const int32_t* slots) {
    const int64_t count = rows.size(0), width = rows.size(1);
    std::vector<const T*> row_pointers(count);
    std::vector<cpu::Compute<T>> row_gates(count), sum(width);
    for (int64_t i = 0; i < count; ++i) {
        row_pointers[i] = rows.const_data_ptr<T>() + i * width;
        row_gates[i] = gates[slots[i]];
    }
    cpu::weighted_sum<T>(sum.data(), row_pointers.data(), row_gates.data(), count, width);
    cpu::round_row<T>(out.mutable_data_ptr<T>(), sum.data(), width);
}

MoeMlpGrads moe_mlp_backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& w_up,
                                 const at::Tensor& w_down, const std::optional<at::Tensor>& b_down,
                                 const at::Tensor& gates, const at::Tensor& z, const at::Tensor& slot_order,
                                 const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                                 std::string_view activation, std::string_view glu_layout, double alpha, double limit,
                                 std::optional<bool> /*allow_tf32*/, std::array<bool, kNumMoeMlpGrads> output_mask) {
    check_moe_mlp_backward(grad, x, w_up, w_down, b_down, gates, z, slot_order, slot_position, expert_offsets,
                           activation, glu_layout, output_mask);
    const ActivationParams params = parse_activation_params("_moe_mlp_backward", activation, glu_layout, alpha, limit);
    const cpu::Grouping grouping("_moe_mlp_backward", slot_order, expert_offsets);
    const int64_t num_slots = grouping.num_slots(), num_experts = grouping.num_experts();
    const int64_t top_k = slot_position.size(1);
    const int64_t in_features = w_up.size(2), z_features = w_up.size(1);
    const int64_t hidden = w_down.size(2), out_features = w_down.size(1);
    const auto options = grad.options();
    // Not a structured binding: Clang before 16 captures none in a lambda.
    const bool need_x = output_mask[kGradX], need_gates = output_mask[kGradGates];
    const bool need_w_up = output_mask[kGradWUp], need_b_up = output_mask[kGradBUp];
    const bool need_w_down = output_mask[kGradWDown], need_b_down = output_mask[kGradBDown];

    const at::Tensor grad_ = cpu::with_contiguous_rows(grad);
    const at::Tensor x_ = need_w_up ? cpu::with_contiguous_rows(x) : x;
    const at::Tensor z_ = z.contiguous();
    const at::Tensor gates_ = gates.to(compute_dtype(grad.scalar_type())).contiguous();
    const std::optional<at::Tensor> b_down_ =
        has_value(b_down) ? std::optional<at::Tensor>(b_down->contiguous()) : std::nullopt;

    at::Tensor slot_grad_x = need_x ? cpu::empty({num_slots, in_features}, options) : at::Tensor();
    at::Tensor grad_w_up = need_w_up ? cpu::empty_like(w_up) : empty_gradient(grad);
    at::Tensor grad_b_up = need_b_up ? cpu::empty({num_experts, z_features}, options) : empty_gradient(grad);
    at::Tensor grad_w_down = need_w_down ? cpu::empty_like(w_down) : empty_gradient(grad);
    at::Tensor grad_b_down = need_b_down ? cpu::empty({num_experts, out_features}, options) : empty_gradient(grad);
    at::Tensor grad_gates = need_gates ? at::zeros(gates.sizes(), gates_.options()) : empty_gradient(grad);

    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, grad.scalar_type(), "_moe_mlp_backward", [&] {
        using Acc = cpu::Compute<scalar_t>;
        const Acc* gate = gates_.const_data_ptr<Acc>();
        Acc* grad_gate = need_gates ? grad_gates.mutable_data_ptr<Acc>() : nullptr;
        cpu::for_each_expert(grouping, options, [&](int64_t expert, cpu::Scratch& scratch) {
            const int64_t begin = grouping.begin(expert), count = grouping.end(expert) - begin;
            if (count == 0) {
                if (need_w_up) grad_w_up.select(0, expert).zero_();
                if (need_b_up) grad_b_up.select(0, expert).zero_();
                if (need_w_down) grad_w_down.select(0, expert).zero_();
                if (need_b_down) grad_b_down.select(0, expert).zero_();
                return;
            }
            const int32_t* slots = grouping.slots(begin);
            scratch.reset(count * (out_features + 2 * hidden + z_features + in_features));
            const at::Tensor expert_grad = scratch.take(count, out_features);
            cpu::gather_rows(expert_grad, grad_, slots, top_k);
            if (need_b_down) gated_sum<scalar_t>(grad_b_down.select(0, expert), expert_grad, gate, slots);
            if (!(need_x || need_w_up || need_b_up || need_w_down || need_gates)) return;

            const at::Tensor dh = scratch.take(count, hidden);
            const at::Tensor dz = scratch.take(count, z_features);
            const at::Tensor gated_h = need_w_down ? scratch.take(count, hidden) : at::Tensor();
            cpu::matmul(dh, expert_grad, w_down.select(0, expert));
            backward_rows<scalar_t>(params, dz, gated_h, z_.narrow(0, begin, count), dh, expert_grad,
                                    select_expert(b_down_, expert), gate, slots, grad_gate);
            if (need_w_down) cpu::matmul(grad_w_down.select(0, expert), expert_grad.t(), gated_h);
            if (need_b_up) {
                at::Tensor out = grad_b_up.select(0, expert);
                at::sum_out(out, dz, /*dim=*/{0});
            }
            if (need_x) cpu::matmul(slot_grad_x.narrow(0, begin, count), dz, w_up.select(0, expert));
            if (need_w_up) {
                const at::Tensor expert_x = scratch.take(count, in_features);
                cpu::gather_rows(expert_x, x_, slots, top_k);
                cpu::matmul(grad_w_up.select(0, expert), dz.t(), expert_x);
            }
        });
    });

    at::Tensor grad_x =
        need_x ? combine(slot_grad_x, /*gates=*/std::nullopt, slot_order, slot_position, true) : empty_gradient(grad);
    if (need_gates) grad_gates = grad_gates.to(gates.scalar_type());
    return {grad_x, grad_w_up, grad_b_up, grad_w_down, grad_b_down, grad_gates};
}

TORCH_LIBRARY_IMPL(scattermoe, CPU, m) {
    m.impl("moe_mlp", TORCH_FN(moe_mlp_cpu));
    m.impl("_moe_mlp_forward", TORCH_FN(moe_mlp_forward_cpu));
    m.impl("_moe_mlp_backward", TORCH_FN(moe_mlp_backward_cpu));
    // The gradient of z is only ever there for a few experts at a time.
    m.impl("_moe_mlp_backward_over_z", TORCH_FN(moe_mlp_backward_cpu));
}

}  // namespace

}  // namespace scattermoe
