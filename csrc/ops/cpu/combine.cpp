#include "../combine.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "grouping.h"
#include "memory.h"
#include "row_kernels.h"
#include "rows.h"

namespace scattermoe {

namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

int64_t tokens_per_task(int64_t top_k, int64_t width) {
    return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, top_k * width));
}

// The gates in the compute dtype of the rows, or an undefined tensor for ones.
at::Tensor compute_gates(const std::optional<at::Tensor>& gates, const at::Tensor& rows) {
    return has_value(gates) ? gates->to(compute_dtype(rows.scalar_type())).contiguous() : at::Tensor();
}

at::Tensor combine_cpu(const at::Tensor& rows, const std::optional<at::Tensor>& gates, const at::Tensor& slot_order,
                       const at::Tensor& slot_position, bool grouped) {
    check_combine(rows, gates, slot_order, slot_position);
    const at::Tensor positions = cpu::checked_slot_position("combine", slot_position);
    const at::Tensor rows_ = cpu::with_contiguous_rows(rows);
    const at::Tensor gates_ = compute_gates(gates, rows);
    const int64_t num_tokens = positions.size(0), top_k = positions.size(1), width = rows.size(1);
    at::Tensor y = cpu::empty({num_tokens, width}, rows.options());

    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, rows.scalar_type(), "combine", [&] {
        using Acc = cpu::Compute<scalar_t>;
        const int32_t* position = positions.const_data_ptr<int32_t>();
        const scalar_t* row = rows_.const_data_ptr<scalar_t>();
        const Acc* gate = gates_.defined() ? gates_.const_data_ptr<Acc>() : nullptr;
        scalar_t* out = y.mutable_data_ptr<scalar_t>();
        const int64_t stride = rows_.stride(0);
        at::parallel_for(0, num_tokens, tokens_per_task(top_k, width), [&](int64_t begin, int64_t end) {
            std::vector<const scalar_t*> token_rows(top_k);
            std::vector<Acc> token_gates(top_k);
            std::vector<Acc> sum(width);
            for (int64_t token = begin; token < end; ++token) {
                int64_t count = 0;
                for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
                    if (position[slot] < 0) continue;
                    token_rows[count] = row + (grouped ? position[slot] : slot) * stride;
                    token_gates[count] = gate ? gate[slot] : Acc(1);
                    ++count;
                }
                cpu::weighted_sum<scalar_t>(sum.data(), token_rows.data(), token_gates.data(), count, width);
                cpu::round_row<scalar_t>(out + token * width, sum.data(), width);
            }
        });
    });
    return y;
}

std::tuple<at::Tensor, at::Tensor> combine_backward_cpu(const at::Tensor& grad, const at::Tensor& rows,
                                                        const std::optional<at::Tensor>& gates,
                                                        const at::Tensor& slot_order, const at::Tensor& slot_position,
                                                        bool grouped, std::array<bool, 2> output_mask) {
    check_combine_backward(grad, rows, gates, slot_order, slot_position, output_mask);
    // Not a structured binding: Clang before 16 captures none in a lambda.
    const bool need_rows = output_mask[0], need_gates = output_mask[1];
    const at::Tensor positions = cpu::checked_slot_position("_combine_backward", slot_position);
    const at::Tensor grad_ = cpu::with_contiguous_rows(grad);
    const at::Tensor rows_ = need_gates ? cpu::with_contiguous_rows(rows) : rows;
    const at::Tensor gates_ = compute_gates(gates, grad);
    const int64_t num_tokens = positions.size(0), top_k = positions.size(1), width = grad.size(1);
    // Sentinel rows have no slot that would write them in grouped order, so they start as zeros.
    at::Tensor grad_rows = need_rows ? at::zeros({num_tokens * top_k, width}, grad.options()) : empty_gradient(grad);
    at::Tensor grad_gates =
        need_gates ? at::zeros({num_tokens, top_k}, grad.options().dtype(compute_dtype(grad.scalar_type())))
                   : empty_gradient(grad);

    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, grad.scalar_type(), "_combine_backward", [&] {
        using Acc = cpu::Compute<scalar_t>;
        const int32_t* position = positions.const_data_ptr<int32_t>();
        const scalar_t* g = grad_.const_data_ptr<scalar_t>();
        const scalar_t* row = need_gates ? rows_.const_data_ptr<scalar_t>() : nullptr;
        const Acc* gate = gates_.defined() ? gates_.const_data_ptr<Acc>() : nullptr;
        scalar_t* out_rows = need_rows ? grad_rows.mutable_data_ptr<scalar_t>() : nullptr;
        Acc* out_gates = need_gates ? grad_gates.mutable_data_ptr<Acc>() : nullptr;
        const int64_t grad_stride = grad_.stride(0), row_stride = need_gates ? rows_.stride(0) : 0;
        at::parallel_for(0, num_tokens, tokens_per_task(top_k, width), [&](int64_t begin, int64_t end) {
            for (int64_t slot = begin * top_k; slot < end * top_k; ++slot) {
                if (position[slot] < 0) continue;
                const scalar_t* token_grad = g + slot / top_k * grad_stride;
                const int64_t at = grouped ? position[slot] : slot;
                if (need_rows) {
                    cpu::scale_row<scalar_t>(out_rows + at * width, token_grad, gate ? gate[slot] : Acc(1), width);
                }
                if (need_gates) out_gates[slot] = cpu::dot<scalar_t>(token_grad, row + at * row_stride, width);
            }
        });
    });
    if (need_gates) grad_gates = grad_gates.to(gates->scalar_type());
    return {grad_rows, grad_gates};
}

TORCH_LIBRARY_IMPL(scattermoe, CPU, m) {
    m.impl("combine", TORCH_FN(combine_cpu));
    m.impl("_combine_backward", TORCH_FN(combine_backward_cpu));
}

}  // namespace

}  // namespace scattermoe
