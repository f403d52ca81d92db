#include "../combine.h"

#include <torch/library.h>

#include "../../kernels/combine.h"
#include "products.h"
#include "support.h"

namespace scattermoe {

namespace {

at::Tensor combine_cuda(const at::Tensor& rows, const std::optional<at::Tensor>& gates, const at::Tensor& slot_order,
                        const at::Tensor& slot_position, bool grouped) {
    check_combine(rows, gates, slot_order, slot_position);
    const c10::cuda::CUDAGuard guard(rows.device());
    return cuda::combine_rows("combine", rows, cuda::compute_gates(gates, rows.scalar_type()), slot_position,
                              slot_position.size(1), grouped);
}

std::tuple<at::Tensor, at::Tensor> combine_backward_cuda(const at::Tensor& grad, const at::Tensor& rows,
                                                         const std::optional<at::Tensor>& gates,
                                                         const at::Tensor& slot_order, const at::Tensor& slot_position,
                                                         bool grouped, std::array<bool, 2> output_mask) {
    check_combine_backward(grad, rows, gates, slot_order, slot_position, output_mask);
    const c10::cuda::CUDAGuard guard(grad.device());
    const auto [need_rows, need_gates] = output_mask;
    const at::Tensor grad_ = grad.contiguous();
    const at::Tensor rows_ = need_gates ? rows.contiguous() : at::Tensor();
    const at::Tensor gates_ = cuda::compute_gates(gates, grad.scalar_type());
    const at::Tensor order = slot_order.contiguous(), positions = slot_position.contiguous();
    const int64_t num_slots = positions.numel(), hidden = grad.size(1);
    at::Tensor grad_rows = need_rows ? at::empty({num_slots, hidden}, grad.options()) : empty_gradient(grad);
    at::Tensor grad_gates = need_gates
                                ? at::empty(positions.sizes(), grad.options().dtype(compute_dtype(grad.scalar_type())))
                                : empty_gradient(grad);

    kernels::CombineBackwardParams p;
    p.dtype = cuda::kernel_dtype(grad.scalar_type());
    p.grad = grad_.const_data_ptr();
    p.rows = cuda::data_or_null(rows_);
    p.gates = cuda::data_or_null(gates_);
    p.slot_order = order.const_data_ptr<int32_t>();
    p.slot_position = positions.const_data_ptr<int32_t>();
    p.grouped = grouped;
    p.grad_rows = need_rows ? grad_rows.mutable_data_ptr() : nullptr;
    p.grad_gates = need_gates ? grad_gates.mutable_data_ptr() : nullptr;
    p.num_slots = num_slots;
    p.top_k = cuda::size_32("_combine_backward", "slot_position.size(1)", positions.size(1));
    p.hidden = hidden;
    cuda::check_launch("_combine_backward", kernels::combine_backward(p, cuda::current_stream()),
                       {{"grad", grad}, {"slot_position", slot_position}});
    if (need_gates) grad_gates = cuda::to_dtype(grad_gates, gates->scalar_type());
    return {grad_rows, grad_gates};
}

TORCH_LIBRARY_IMPL(scattermoe, CUDA, m) {
    m.impl("combine", TORCH_FN(combine_cuda));
    m.impl("_combine_backward", TORCH_FN(combine_backward_cuda));
}

}  // namespace

}  // namespace scattermoe
