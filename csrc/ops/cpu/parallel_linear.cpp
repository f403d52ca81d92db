#include "../parallel_linear.h"

#include <torch/library.h>

#include "../checks.h"
#include "expert_schedule.h"
#include "grouping.h"
#include "matmul.h"
#include "memory.h"
#include "rows.h"

namespace scattermoe {

namespace {

at::Tensor parallel_linear_cpu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const at::Tensor& slot_order, const at::Tensor& expert_offsets, c10::SymInt top_k,
                               bool grouped_in, bool grouped_out, std::optional<bool> /*allow_tf32*/) {
    check_parallel_linear(x, weight, bias, slot_order, expert_offsets, top_k, grouped_in);
    const cpu::Grouping grouping("parallel_linear", slot_order, expert_offsets);
    const int64_t slots_per_row = top_k.expect_int();
    const int64_t in_features = weight.size(2), out_features = weight.size(1);
    const at::Tensor rows = grouped_in ? x : cpu::with_contiguous_rows(x);
    at::Tensor y = cpu::empty({grouping.num_slots(), out_features}, x.options());

    cpu::for_each_expert(grouping, x.options(), [&](int64_t expert, cpu::Scratch& scratch) {
        const int64_t begin = grouping.begin(expert), count = grouping.end(expert) - begin;
        if (count == 0) return;
        const int32_t* slots = grouping.slots(begin);
        scratch.reset(count * ((grouped_in ? 0 : in_features) + (grouped_out ? 0 : out_features)));
        at::Tensor in;
        if (grouped_in) {
            in = rows.narrow(0, begin, count);
        } else {
            in = scratch.take(count, in_features);
            cpu::gather_rows(in, rows, slots, slots_per_row);
        }
        const at::Tensor out = grouped_out ? y.narrow(0, begin, count) : scratch.take(count, out_features);
        cpu::matmul(out, in, weight.select(0, expert).t(),
                    has_value(bias) ? std::optional<at::Tensor>(bias->select(0, expert)) : std::nullopt);
        if (!grouped_out) cpu::scatter_rows(y, out, slots);
    });

    const int64_t num_sentinels = grouping.num_slots() - grouping.num_rows();
    if (grouped_out) {
        y.narrow(0, grouping.num_rows(), num_sentinels).zero_();
    } else {
        cpu::zero_rows(y, grouping.slots(grouping.num_rows()), num_sentinels);
    }
    return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> parallel_linear_backward_cpu(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& slot_order,
    const at::Tensor& expert_offsets, c10::SymInt top_k, bool grouped_in, bool grouped_out,
    std::optional<bool> /*allow_tf32*/, std::array<bool, 3> output_mask) {
    check_parallel_linear_backward(grad, x, weight, slot_order, expert_offsets, top_k, grouped_in, output_mask);
    const cpu::Grouping grouping("_parallel_linear_backward", slot_order, expert_offsets);
    const int64_t slots_per_row = top_k.expect_int();
    const int64_t in_features = weight.size(2), out_features = weight.size(1);
    const auto options = grad.options();
    // Not a structured binding: Clang before 16 captures none in a lambda.
    const bool need_x = output_mask[0], need_weight = output_mask[1], need_bias = output_mask[2];

    const at::Tensor grad_rows = grouped_out ? grad : cpu::with_contiguous_rows(grad);
    const at::Tensor x_rows = !need_weight || grouped_in ? x : cpu::with_contiguous_rows(x);
    // The gradient of every slot's copy of its row, in x's order.
    at::Tensor slot_grad_x = need_x ? cpu::empty({grouping.num_slots(), in_features}, options) : at::Tensor();
    at::Tensor grad_weight = need_weight ? cpu::empty_like(weight) : empty_gradient(grad);
    at::Tensor grad_bias = need_bias ? cpu::empty({weight.size(0), out_features}, options) : empty_gradient(grad);

    cpu::for_each_expert(grouping, options, [&](int64_t expert, cpu::Scratch& scratch) {
        const int64_t begin = grouping.begin(expert), count = grouping.end(expert) - begin;
        if (count == 0) {
            if (need_weight) grad_weight.select(0, expert).zero_();
            if (need_bias) grad_bias.select(0, expert).zero_();
            return;
        }
        const int32_t* slots = grouping.slots(begin);
        scratch.reset(count * (out_features + 2 * in_features));
        at::Tensor g;
        if (grouped_out) {
            g = grad_rows.narrow(0, begin, count);
        } else {
            g = scratch.take(count, out_features);
            cpu::gather_rows(g, grad_rows, slots, 1);
        }
        if (need_x) {
            const at::Tensor out = grouped_in ? slot_grad_x.narrow(0, begin, count) : scratch.take(count, in_features);
            cpu::matmul(out, g, weight.select(0, expert));
            if (!grouped_in) cpu::scatter_rows(slot_grad_x, out, slots);
        }
        if (need_weight) {
            at::Tensor in;
            if (grouped_in) {
                in = x_rows.narrow(0, begin, count);
            } else {
                in = scratch.take(count, in_features);
                cpu::gather_rows(in, x_rows, slots, slots_per_row);
            }
            cpu::matmul(grad_weight.select(0, expert), g.t(), in);
        }
        if (need_bias) {
            at::Tensor out = grad_bias.select(0, expert);
            at::sum_out(out, g, /*dim=*/{0});
        }
    });

    at::Tensor grad_x = empty_gradient(grad);
    if (need_x) {
        const int64_t num_sentinels = grouping.num_slots() - grouping.num_rows();
        if (grouped_in) {
            slot_grad_x.narrow(0, grouping.num_rows(), num_sentinels).zero_();
        } else {
            cpu::zero_rows(slot_grad_x, grouping.slots(grouping.num_rows()), num_sentinels);
        }
        grad_x = slots_per_row == 1
                     ? slot_grad_x
                     : slot_grad_x.view({grouping.num_slots() / slots_per_row, slots_per_row, in_features}).sum(1);
    }
    return {grad_x, grad_weight, grad_bias};
}

TORCH_LIBRARY_IMPL(scattermoe, CPU, m) {
    m.impl("parallel_linear", TORCH_FN(parallel_linear_cpu));
    m.impl("_parallel_linear_backward", TORCH_FN(parallel_linear_backward_cpu));
}

}  // namespace

}  // namespace scattermoe
