#include "../parallel_linear.h"

#include <torch/library.h>

#include "../checks.h"

namespace scattermoe {

namespace {

at::Tensor parallel_linear_meta(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                const at::Tensor& slot_order, const at::Tensor& expert_offsets, c10::SymInt top_k,
                                bool grouped_in, bool /*grouped_out*/, std::optional<bool> /*allow_tf32*/) {
    check_parallel_linear(x, weight, bias, slot_order, expert_offsets, top_k, grouped_in);
    return at::empty_symint({slot_order.sym_size(0), weight.sym_size(1)}, x.options());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> parallel_linear_backward_meta(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& slot_order,
    const at::Tensor& expert_offsets, c10::SymInt top_k, bool grouped_in, bool /*grouped_out*/,
    std::optional<bool> /*allow_tf32*/, std::array<bool, 3> output_mask) {
    check_parallel_linear_backward(grad, x, weight, slot_order, expert_offsets, top_k, grouped_in, output_mask);
    const auto options = grad.options();
    return {
        output_mask[0] ? at::empty_symint({slot_order.sym_size(0) / top_k, weight.sym_size(2)}, options)
                       : empty_gradient(grad),
        output_mask[1] ? at::empty_like(weight) : empty_gradient(grad),
        output_mask[2] ? at::empty_symint({weight.sym_size(0), weight.sym_size(1)}, options) : empty_gradient(grad)};
}

TORCH_LIBRARY_IMPL(scattermoe, Meta, m) {
    m.impl("parallel_linear", TORCH_FN(parallel_linear_meta));
    m.impl("_parallel_linear_backward", TORCH_FN(parallel_linear_backward_meta));
}

}  // namespace

}  // namespace scattermoe
