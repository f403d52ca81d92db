#include "moe_mlp.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>
#include <utility>

#include "checks.h"

namespace scattermoe {

at::Tensor moe_mlp(const at::Tensor& x, const at::Tensor& w_up, const std::optional<at::Tensor>& b_up,
                   const at::Tensor& w_down, const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                   const at::Tensor& slot_order, const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                   std::string_view activation, std::string_view glu_layout, double alpha, double limit,
                   std::optional<bool> allow_tf32, bool recompute) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("scattermoe::moe_mlp", "").typed<decltype(moe_mlp)>();
    return op.call(x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets, activation,
                   glu_layout, alpha, limit, allow_tf32, recompute);
}

std::tuple<at::Tensor, at::Tensor> _moe_mlp_forward(const at::Tensor& x, const at::Tensor& w_up,
                                                    const std::optional<at::Tensor>& b_up, const at::Tensor& w_down,
                                                    const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                                                    const at::Tensor& slot_order, const at::Tensor& slot_position,
                                                    const at::Tensor& expert_offsets, std::string_view activation,
                                                    std::string_view glu_layout, double alpha, double limit,
                                                    std::optional<bool> allow_tf32) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("scattermoe::_moe_mlp_forward", "")
                               .typed<decltype(_moe_mlp_forward)>();
    return op.call(x, w_up, b_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets, activation,
                   glu_layout, alpha, limit, allow_tf32);
}

MoeMlpGrads _moe_mlp_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& w_up,
                              const at::Tensor& w_down, const std::optional<at::Tensor>& b_down,
                              const at::Tensor& gates, const at::Tensor& z, const at::Tensor& slot_order,
                              const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                              std::string_view activation, std::string_view glu_layout, double alpha, double limit,
                              std::optional<bool> allow_tf32, std::array<bool, kNumMoeMlpGrads> output_mask) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("scattermoe::_moe_mlp_backward", "")
                               .typed<decltype(_moe_mlp_backward)>();
    return op.call(grad, x, w_up, w_down, b_down, gates, z, slot_order, slot_position, expert_offsets, activation,
                   glu_layout, alpha, limit, allow_tf32, output_mask);
}

MoeMlpGrads _moe_mlp_backward_over_z(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& w_up,
                                     const at::Tensor& w_down, const std::optional<at::Tensor>& b_down,
                                     const at::Tensor& gates, const at::Tensor& z, const at::Tensor& slot_order,
                                     const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                                     std::string_view activation, std::string_view glu_layout, double alpha,
                                     double limit, std::optional<bool> allow_tf32,
                                     std::array<bool, kNumMoeMlpGrads> output_mask) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("scattermoe::_moe_mlp_backward_over_z", "")
                               .typed<decltype(_moe_mlp_backward_over_z)>();
    return op.call(grad, x, w_up, w_down, b_down, gates, z, slot_order, slot_position, expert_offsets, activation,
                   glu_layout, alpha, limit, allow_tf32, output_mask);
}

namespace {

void check_weights_and_routing(const char* op, const at::Tensor& w_up, const at::Tensor& w_down,
                               const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                               const at::Tensor& slot_order, const at::Tensor& slot_position,
                               const at::Tensor& expert_offsets, std::string_view activation,
                               std::string_view glu_layout) {
    const bool gated = is_gated(parse_activation(op, activation));
    parse_glu_layout(op, glu_layout);
    check_dim(op, {"w_up", w_up}, 3);
    check_dim(op, {"w_down", w_down}, 3);
    check_at_least(op, {"w_up.size(0)", w_up.sym_size(0)}, 1);
    check_size(op, {"w_down.size(0)", w_down.sym_size(0)}, {"w_up.size(0)", w_up.sym_size(0)});
    if (gated) {
        check_size(op, {"w_up.size(1)", w_up.sym_size(1)},
                   {"2 * w_down.size(2) (the activation is gated)", w_down.sym_size(2) * 2});
    } else {
        check_size(op, {"w_up.size(1)", w_up.sym_size(1)},
                   {"w_down.size(2) (the activation is not gated)", w_down.sym_size(2)});
    }
    check_bias(op, {"b_down", b_down.value_or(at::Tensor())}, {"w_down", w_down});
    check_index(op, {"slot_order", slot_order}, 1);
    check_index(op, {"slot_position", slot_position}, 2);
    check_index(op, {"expert_offsets", expert_offsets}, 1);
    check_at_least(op, {"slot_position.size(1)", slot_position.sym_size(1)}, 1);
    check_size(op, {"slot_position.numel()", slot_position.sym_numel()},
               {"slot_order.size(0)", slot_order.sym_size(0)});
    check_size(op, {"expert_offsets.size(0)", expert_offsets.sym_size(0)}, {"w_up.size(0) + 1", w_up.sym_size(0) + 1});
    check_dim(op, {"gates", gates}, 2);
    check_floating(op, {"gates", gates});
    check_size(op, {"gates.size(0)", gates.sym_size(0)}, {"slot_position.size(0)", slot_position.sym_size(0)});
    check_size(op, {"gates.size(1)", gates.sym_size(1)}, {"slot_position.size(1)", slot_position.sym_size(1)});
}

void check_x(const char* op, const at::Tensor& x, const at::Tensor& w_up, const at::Tensor& slot_position) {
    check_dim(op, {"x", x}, 2);
    check_size(op, {"x.size(0)", x.sym_size(0)}, {"slot_position.size(0)", slot_position.sym_size(0)});
    check_size(op, {"x.size(1)", x.sym_size(1)}, {"w_up.size(2)", w_up.sym_size(2)});
}

}  // namespace

void check_moe_mlp(const at::Tensor& x, const at::Tensor& w_up, const std::optional<at::Tensor>& b_up,
                   const at::Tensor& w_down, const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                   const at::Tensor& slot_order, const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                   std::string_view activation, std::string_view glu_layout) {
    constexpr const char* kOp = "moe_mlp";
    check_weights_and_routing(kOp, w_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets, activation,
                              glu_layout);
    check_x(kOp, x, w_up, slot_position);
    const at::Tensor b_up_or_undefined = b_up.value_or(at::Tensor());
    check_bias(kOp, {"b_up", b_up_or_undefined}, {"w_up", w_up});
    const at::Tensor b_down_or_undefined = b_down.value_or(at::Tensor());
    check_same_float_dtype(
        kOp, {"x", x},
        {{"w_up", w_up}, {"b_up", b_up_or_undefined}, {"w_down", w_down}, {"b_down", b_down_or_undefined}});
    check_same_device(kOp, {"x", x},
                      {{"w_up", w_up},
                       {"b_up", b_up_or_undefined},
                       {"w_down", w_down},
                       {"b_down", b_down_or_undefined},
                       {"gates", gates},
                       {"slot_order", slot_order},
                       {"slot_position", slot_position},
                       {"expert_offsets", expert_offsets}});
}

void check_moe_mlp_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& w_up,
                            const at::Tensor& w_down, const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                            const at::Tensor& z, const at::Tensor& slot_order, const at::Tensor& slot_position,
                            const at::Tensor& expert_offsets, std::string_view activation, std::string_view glu_layout,
                            const std::array<bool, kNumMoeMlpGrads>& output_mask) {
    constexpr const char* kOp = "_moe_mlp_backward";
    check_weights_and_routing(kOp, w_up, w_down, b_down, gates, slot_order, slot_position, expert_offsets, activation,
                              glu_layout);
    if (output_mask[kGradWUp]) check_x(kOp, x, w_up, slot_position);
    check_dim(kOp, {"grad", grad}, 2);
    check_size(kOp, {"grad.size(0)", grad.sym_size(0)}, {"slot_position.size(0)", slot_position.sym_size(0)});
    check_size(kOp, {"grad.size(1)", grad.sym_size(1)}, {"w_down.size(1)", w_down.sym_size(1)});
    check_dim(kOp, {"z", z}, 2);
    check_size(kOp, {"z.size(0)", z.sym_size(0)}, {"slot_order.size(0)", slot_order.sym_size(0)});
    check_size(kOp, {"z.size(1)", z.sym_size(1)}, {"w_up.size(1)", w_up.sym_size(1)});
    const at::Tensor b_down_or_undefined = b_down.value_or(at::Tensor());
    check_same_float_dtype(kOp, {"grad", grad},
                           {{"x", x}, {"w_up", w_up}, {"w_down", w_down}, {"b_down", b_down_or_undefined}, {"z", z}});
    check_same_device(kOp, {"grad", grad},
                      {{"x", x},
                       {"w_up", w_up},
                       {"w_down", w_down},
                       {"b_down", b_down_or_undefined},
                       {"gates", gates},
                       {"z", z},
                       {"slot_order", slot_order},
                       {"slot_position", slot_position},
                       {"expert_offsets", expert_offsets}});
}

namespace {

TORCH_LIBRARY_FRAGMENT(scattermoe, m) {
    m.def(
        "moe_mlp(Tensor x, Tensor w_up, Tensor? b_up, Tensor w_down, Tensor? b_down, Tensor gates, Tensor slot_order, "
        "Tensor slot_position, Tensor expert_offsets, str activation='swiglu', str glu_layout='gate_up', "
        "float alpha=1.702, float limit=7.0, bool? allow_tf32=None, bool recompute=False) -> Tensor",
        {at::Tag::pt2_compliant_tag});
    m.def(
        "_moe_mlp_forward(Tensor x, Tensor w_up, Tensor? b_up, Tensor w_down, Tensor? b_down, Tensor gates, "
        "Tensor slot_order, Tensor slot_position, Tensor expert_offsets, str activation, str glu_layout, float alpha, "
        "float limit, bool? allow_tf32) -> (Tensor y, Tensor z)",
        {at::Tag::pt2_compliant_tag});
    for (const auto& [name, z] :
         {std::pair{"_moe_mlp_backward", "Tensor z"}, std::pair{"_moe_mlp_backward_over_z", "Tensor(a!) z"}}) {
        const std::string schema =
            std::string(name) + "(Tensor grad, Tensor x, Tensor w_up, Tensor w_down, Tensor? b_down, Tensor gates, " +
            z +
            ", Tensor slot_order, Tensor slot_position, Tensor expert_offsets, str activation, str glu_layout, "
            "float alpha, float limit, bool? allow_tf32, bool[6] output_mask) -> (Tensor grad_x, Tensor grad_w_up, "
            "Tensor grad_b_up, Tensor grad_w_down, Tensor grad_b_down, Tensor grad_gates)";
        m.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
    }
}

}  // namespace

}  // namespace scattermoe
