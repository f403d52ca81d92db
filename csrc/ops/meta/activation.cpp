#include "../activation.h"

#include <torch/library.h>

namespace scattermoe {

namespace {

at::Tensor activation_meta(const at::Tensor& z, std::string_view activation, std::string_view glu_layout,
                           double /*alpha*/, double /*limit*/) {
    return at::empty_symint({z.sym_size(0), check_activation(z, activation, glu_layout)}, z.options());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> activation_backward_meta(
    const at::Tensor& grad_hidden, const at::Tensor& z, const at::Tensor& gates, const at::Tensor& slot_order,
    const at::Tensor& expert_offsets, std::string_view activation, std::string_view glu_layout, double /*alpha*/,
    double /*limit*/) {
    check_activation_backward(grad_hidden, z, gates, slot_order, expert_offsets, activation, glu_layout);
    return {at::empty_symint(z.sym_sizes(), z.options()),
            at::empty_symint(grad_hidden.sym_sizes(), grad_hidden.options()),
            at::empty_symint(gates.sym_sizes(), gates.options())};
}

TORCH_LIBRARY_IMPL(scattermoe, Meta, m) {
    m.impl("_activation", TORCH_FN(activation_meta));
    m.impl("_activation_backward", TORCH_FN(activation_backward_meta));
}

}  // namespace

}  // namespace scattermoe
