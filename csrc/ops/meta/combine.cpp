#include "../combine.h"

#include <torch/library.h>

#include "../checks.h"

namespace scattermoe {

namespace {

at::Tensor combine_meta(const at::Tensor& rows, const std::optional<at::Tensor>& gates, const at::Tensor& slot_order,
                        const at::Tensor& slot_position, bool /*grouped*/) {
    check_combine(rows, gates, slot_order, slot_position);
    return at::empty_symint({slot_position.sym_size(0), rows.sym_size(1)}, rows.options());
}

std::tuple<at::Tensor, at::Tensor> combine_backward_meta(const at::Tensor& grad, const at::Tensor& rows,
                                                         const std::optional<at::Tensor>& gates,
                                                         const at::Tensor& slot_order, const at::Tensor& slot_position,
                                                         bool /*grouped*/, std::array<bool, 2> output_mask) {
    check_combine_backward(grad, rows, gates, slot_order, slot_position, output_mask);
    return {output_mask[0] ? at::empty_symint({slot_order.sym_size(0), grad.sym_size(1)}, grad.options())
                           : empty_gradient(grad),
            output_mask[1] ? at::empty_symint(gates->sym_sizes(), gates->options()) : empty_gradient(grad)};
}

TORCH_LIBRARY_IMPL(scattermoe, Meta, m) {
    m.impl("combine", TORCH_FN(combine_meta));
    m.impl("_combine_backward", TORCH_FN(combine_backward_meta));
}

}  // namespace

}  // namespace scattermoe
