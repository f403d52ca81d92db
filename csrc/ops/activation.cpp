#include "activation.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "checks.h"

namespace scattermoe {

at::Tensor _activation(const at::Tensor& z, std::string_view activation, std::string_view glu_layout, double alpha,
                       double limit) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("scattermoe::_activation", "").typed<decltype(_activation)>();
    return op.call(z, activation, glu_layout, alpha, limit);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> _activation_backward(
    const at::Tensor& grad_hidden, const at::Tensor& z, const at::Tensor& gates, const at::Tensor& slot_order,
    const at::Tensor& expert_offsets, std::string_view activation, std::string_view glu_layout, double alpha,
    double limit) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("scattermoe::_activation_backward", "")
                               .typed<decltype(_activation_backward)>();
    return op.call(grad_hidden, z, gates, slot_order, expert_offsets, activation, glu_layout, alpha, limit);
}

c10::SymInt check_activation(const at::Tensor& z, std::string_view activation, std::string_view glu_layout) {
    constexpr const char* kOp = "_activation";
    const bool gated = is_gated(parse_activation(kOp, activation));
    parse_glu_layout(kOp, glu_layout);
    check_dim(kOp, {"z", z}, 2);
    check_same_float_dtype(kOp, {"z", z}, {});
    if (!gated) return z.sym_size(1);
    check_size(kOp, {"z.size(1) % 2 (the activation is gated)", z.sym_size(1) % 2}, {"0", 0});
    return z.sym_size(1) / 2;
}

c10::SymInt check_activation_backward(const at::Tensor& grad_hidden, const at::Tensor& z, const at::Tensor& gates,
                                      const at::Tensor& slot_order, const at::Tensor& expert_offsets,
                                      std::string_view activation, std::string_view glu_layout) {
    constexpr const char* kOp = "_activation_backward";
    const c10::SymInt width = check_activation(z, activation, glu_layout);
    check_dim(kOp, {"grad_hidden", grad_hidden}, 2);
    check_size(kOp, {"grad_hidden.size(1)", grad_hidden.sym_size(1)}, {"the activation's columns", width});
    check_index(kOp, {"slot_order", slot_order}, 1);
    check_index(kOp, {"expert_offsets", expert_offsets}, 1);
    check_at_least(kOp, {"expert_offsets.size(0)", expert_offsets.sym_size(0)}, 2);
    check_size(kOp, {"grad_hidden.size(0)", grad_hidden.sym_size(0)}, {"slot_order.size(0)", slot_order.sym_size(0)});
    check_size(kOp, {"z.size(0)", z.sym_size(0)}, {"slot_order.size(0)", slot_order.sym_size(0)});
    check_dim(kOp, {"gates", gates}, 2);
    check_floating(kOp, {"gates", gates});
    check_size(kOp, {"gates.numel()", gates.sym_numel()}, {"slot_order.size(0)", slot_order.sym_size(0)});
    check_same_float_dtype(kOp, {"grad_hidden", grad_hidden}, {{"z", z}});
    check_same_device(kOp, {"grad_hidden", grad_hidden},
                      {{"z", z}, {"gates", gates}, {"slot_order", slot_order}, {"expert_offsets", expert_offsets}});
    return width;
}

namespace {

TORCH_LIBRARY_FRAGMENT(scattermoe, m) {
    m.def("_activation(Tensor z, str activation, str glu_layout, float alpha, float limit) -> Tensor",
          {at::Tag::pt2_compliant_tag});
    m.def(
        "_activation_backward(Tensor grad_hidden, Tensor z, Tensor gates, Tensor slot_order, Tensor expert_offsets, "
        "str activation, str glu_layout, float alpha, float limit) -> (Tensor grad_z, Tensor gated_hidden, "
        "Tensor grad_gates)",
        {at::Tag::pt2_compliant_tag});
}

}  // namespace

}  // namespace scattermoe
