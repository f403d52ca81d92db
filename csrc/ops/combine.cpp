#include "combine.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "checks.h"

namespace scattermoe {

at::Tensor combine(const at::Tensor& rows, const std::optional<at::Tensor>& gates, const at::Tensor& slot_order,
                   const at::Tensor& slot_position, bool grouped) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("scattermoe::combine", "").typed<decltype(combine)>();
    return op.call(rows, gates, slot_order, slot_position, grouped);
}

std::tuple<at::Tensor, at::Tensor> _combine_backward(const at::Tensor& grad, const at::Tensor& rows,
                                                     const std::optional<at::Tensor>& gates,
                                                     const at::Tensor& slot_order, const at::Tensor& slot_position,
                                                     bool grouped, std::array<bool, 2> output_mask) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("scattermoe::_combine_backward", "")
                               .typed<decltype(_combine_backward)>();
    return op.call(grad, rows, gates, slot_order, slot_position, grouped, output_mask);
}

namespace {

void check_gates_and_routing(const char* op, const std::optional<at::Tensor>& gates, const at::Tensor& slot_order,
                             const at::Tensor& slot_position) {
    check_index(op, {"slot_order", slot_order}, 1);
    check_index(op, {"slot_position", slot_position}, 2);
    check_at_least(op, {"slot_position.size(1)", slot_position.sym_size(1)}, 1);
    check_size(op, {"slot_position.numel()", slot_position.sym_numel()},
               {"slot_order.size(0)", slot_order.sym_size(0)});
    if (has_value(gates)) {
        check_dim(op, {"gates", *gates}, 2);
        check_floating(op, {"gates", *gates});
        check_size(op, {"gates.size(0)", gates->sym_size(0)}, {"slot_position.size(0)", slot_position.sym_size(0)});
        check_size(op, {"gates.size(1)", gates->sym_size(1)}, {"slot_position.size(1)", slot_position.sym_size(1)});
    }
}

}  // namespace

void check_combine(const at::Tensor& rows, const std::optional<at::Tensor>& gates, const at::Tensor& slot_order,
                   const at::Tensor& slot_position) {
    constexpr const char* kOp = "combine";
    check_dim(kOp, {"rows", rows}, 2);
    check_floating(kOp, {"rows", rows});
    check_gates_and_routing(kOp, gates, slot_order, slot_position);
    check_size(kOp, {"rows.size(0)", rows.sym_size(0)}, {"slot_order.size(0)", slot_order.sym_size(0)});
    check_same_device(
        kOp, {"rows", rows},
        {{"gates", gates.value_or(at::Tensor())}, {"slot_order", slot_order}, {"slot_position", slot_position}});
}

void check_combine_backward(const at::Tensor& grad, const at::Tensor& rows, const std::optional<at::Tensor>& gates,
                            const at::Tensor& slot_order, const at::Tensor& slot_position,
                            const std::array<bool, 2>& output_mask) {
    constexpr const char* kOp = "_combine_backward";
    check_dim(kOp, {"grad", grad}, 2);
    check_gates_and_routing(kOp, gates, slot_order, slot_position);
    check_size(kOp, {"grad.size(0)", grad.sym_size(0)}, {"slot_position.size(0)", slot_position.sym_size(0)});
    if (output_mask[1]) {
        check_dim(kOp, {"rows", rows}, 2);
        TORCH_CHECK_VALUE(has_value(gates), "scattermoe::", kOp, ": expected gates where output_mask asks for theirs");
        check_size(kOp, {"rows.size(0)", rows.sym_size(0)}, {"slot_order.size(0)", slot_order.sym_size(0)});
        check_size(kOp, {"rows.size(1)", rows.sym_size(1)}, {"grad.size(1)", grad.sym_size(1)});
    }
    check_same_float_dtype(kOp, {"grad", grad}, {{"rows", rows}});
    check_same_device(kOp, {"grad", grad},
                      {{"rows", rows},
                       {"gates", gates.value_or(at::Tensor())},
                       {"slot_order", slot_order},
                       {"slot_position", slot_position}});
}

namespace {

TORCH_LIBRARY_FRAGMENT(scattermoe, m) {
    m.def("combine(Tensor rows, Tensor? gates, Tensor slot_order, Tensor slot_position, bool grouped=True) -> Tensor",
          {at::Tag::pt2_compliant_tag});
    m.def(
        "_combine_backward(Tensor grad, Tensor rows, Tensor? gates, Tensor slot_order, Tensor slot_position, "
        "bool grouped, bool[2] output_mask) -> (Tensor grad_rows, Tensor grad_gates)",
        {at::Tag::pt2_compliant_tag});
}

}  // namespace

}  // namespace scattermoe
