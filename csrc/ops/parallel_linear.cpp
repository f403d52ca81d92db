#include "parallel_linear.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "checks.h"

namespace scattermoe {

at::Tensor parallel_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           const at::Tensor& slot_order, const at::Tensor& expert_offsets, c10::SymInt top_k,
                           bool grouped_in, bool grouped_out, std::optional<bool> allow_tf32) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("scattermoe::parallel_linear", "")
                               .typed<decltype(parallel_linear)>();
    return op.call(x, weight, bias, slot_order, expert_offsets, std::move(top_k), grouped_in, grouped_out, allow_tf32);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> _parallel_linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& slot_order,
    const at::Tensor& expert_offsets, c10::SymInt top_k, bool grouped_in, bool grouped_out,
    std::optional<bool> allow_tf32, std::array<bool, 3> output_mask) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("scattermoe::_parallel_linear_backward", "")
                               .typed<decltype(_parallel_linear_backward)>();
    return op.call(grad, x, weight, slot_order, expert_offsets, std::move(top_k), grouped_in, grouped_out, allow_tf32,
                   output_mask);
}

namespace {

void check_weight_and_routing(const char* op, const at::Tensor& weight, const at::Tensor& slot_order,
                              const at::Tensor& expert_offsets, const c10::SymInt& top_k, bool grouped_in) {
    check_dim(op, {"weight", weight}, 3);
    check_at_least(op, {"weight.size(0)", weight.sym_size(0)}, 1);
    check_index(op, {"slot_order", slot_order}, 1);
    check_index(op, {"expert_offsets", expert_offsets}, 1);
    check_size(op, {"expert_offsets.size(0)", expert_offsets.sym_size(0)},
               {"weight.size(0) + 1", weight.sym_size(0) + 1});
    check_at_least(op, {"top_k", top_k}, 1);
    if (grouped_in) check_size(op, {"top_k", top_k}, {"1 (grouped rows belong to one slot each)", 1});
}

void check_x(const char* op, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& slot_order,
             const c10::SymInt& top_k) {
    check_dim(op, {"x", x}, 2);
    check_size(op, {"x.size(1)", x.sym_size(1)}, {"weight.size(2)", weight.sym_size(2)});
    check_size(op, {"x.size(0) * top_k", x.sym_size(0) * top_k}, {"slot_order.size(0)", slot_order.sym_size(0)});
}

}  // namespace

void check_parallel_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           const at::Tensor& slot_order, const at::Tensor& expert_offsets, const c10::SymInt& top_k,
                           bool grouped_in) {
    constexpr const char* kOp = "parallel_linear";
    const at::Tensor bias_or_undefined = bias.value_or(at::Tensor());
    check_weight_and_routing(kOp, weight, slot_order, expert_offsets, top_k, grouped_in);
    check_x(kOp, x, weight, slot_order, top_k);
    check_bias(kOp, {"bias", bias_or_undefined}, {"weight", weight});
    check_same_float_dtype(kOp, {"x", x}, {{"weight", weight}, {"bias", bias_or_undefined}});
    check_same_device(kOp, {"x", x},
                      {{"weight", weight},
                       {"bias", bias_or_undefined},
                       {"slot_order", slot_order},
                       {"expert_offsets", expert_offsets}});
}

void check_parallel_linear_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                    const at::Tensor& slot_order, const at::Tensor& expert_offsets,
                                    const c10::SymInt& top_k, bool grouped_in, const std::array<bool, 3>& output_mask) {
    constexpr const char* kOp = "_parallel_linear_backward";
    check_weight_and_routing(kOp, weight, slot_order, expert_offsets, top_k, grouped_in);
    check_dim(kOp, {"grad", grad}, 2);
    check_size(kOp, {"grad.size(0)", grad.sym_size(0)}, {"slot_order.size(0)", slot_order.sym_size(0)});
    check_size(kOp, {"grad.size(1)", grad.sym_size(1)}, {"weight.size(1)", weight.sym_size(1)});
    if (output_mask[1]) check_x(kOp, x, weight, slot_order, top_k);
    check_same_float_dtype(kOp, {"grad", grad}, {{"x", x}, {"weight", weight}});
    check_same_device(kOp, {"grad", grad},
                      {{"x", x}, {"weight", weight}, {"slot_order", slot_order}, {"expert_offsets", expert_offsets}});
}

namespace {

TORCH_LIBRARY_FRAGMENT(scattermoe, m) {
    m.def(
        "parallel_linear(Tensor x, Tensor weight, Tensor? bias, Tensor slot_order, Tensor expert_offsets, "
        "SymInt top_k, bool grouped_in=False, bool grouped_out=False, bool? allow_tf32=None) -> Tensor",
        {at::Tag::pt2_compliant_tag});
    m.def(
        "_parallel_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor slot_order, Tensor expert_offsets, "
        "SymInt top_k, bool grouped_in, bool grouped_out, bool? allow_tf32, bool[3] output_mask) "
        "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        {at::Tag::pt2_compliant_tag});
}

}  // namespace

}  // namespace scattermoe
