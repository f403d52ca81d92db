#include "topk_gating.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "checks.h"

namespace scattermoe {

std::tuple<at::Tensor, at::Tensor> topk_gating(const at::Tensor& logits, c10::SymInt k, std::string_view scoring,
                                               bool normalize, const std::optional<at::Tensor>& selection_bias,
                                               c10::SymInt num_groups, c10::SymInt top_groups, double scale) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("scattermoe::topk_gating", "").typed<decltype(topk_gating)>();
    return op.call(logits, std::move(k), scoring, normalize, selection_bias, std::move(num_groups),
                   std::move(top_groups), scale);
}

at::Tensor _topk_gating_backward(const at::Tensor& grad_gates, const at::Tensor& logits, const at::Tensor& expert_ids,
                                 std::string_view scoring, bool normalize, double scale) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("scattermoe::_topk_gating_backward", "")
                               .typed<decltype(_topk_gating_backward)>();
    return op.call(grad_gates, logits, expert_ids, scoring, normalize, scale);
}

Scoring parse_scoring(const char* op, std::string_view name) {
    if (name == "softmax") return Scoring::kSoftmax;
    if (name == "sigmoid") return Scoring::kSigmoid;
    TORCH_CHECK_VALUE(false, "scattermoe::", op, ": unknown scoring '", name, "', expected softmax or sigmoid");
}

void check_topk_gating(const at::Tensor& logits, const c10::SymInt& k, std::string_view scoring,
                       const std::optional<at::Tensor>& selection_bias, const c10::SymInt& num_groups,
                       const c10::SymInt& top_groups) {
    constexpr const char* kOp = "topk_gating";
    parse_scoring(kOp, scoring);
    check_dim(kOp, {"logits", logits}, 2);
    check_floating(kOp, {"logits", logits});
    const c10::SymInt num_experts = logits.sym_size(1);
    check_at_least(kOp, {"k", k}, 1);
    TORCH_CHECK_VALUE(k.sym_le(num_experts).expect_true(__FILE__, __LINE__), "scattermoe::", kOp,
                      ": expected k <= logits.size(1) (the number of experts), got ", k, " and ", num_experts);
    check_at_least(kOp, {"num_groups", num_groups}, 1);
    check_at_least(kOp, {"top_groups", top_groups}, 1);
    TORCH_CHECK_VALUE((num_experts % num_groups).sym_eq(0).expect_true(__FILE__, __LINE__), "scattermoe::", kOp,
                      ": expected num_groups to divide logits.size(1) (the number of experts), got ", num_groups,
                      " and ", num_experts);
    TORCH_CHECK_VALUE(top_groups.sym_le(num_groups).expect_true(__FILE__, __LINE__), "scattermoe::", kOp,
                      ": expected top_groups <= num_groups, got ", top_groups, " and ", num_groups);
    const c10::SymInt selectable = num_experts / num_groups * top_groups;
    TORCH_CHECK_VALUE(k.sym_le(selectable).expect_true(__FILE__, __LINE__), "scattermoe::", kOp,
                      ": expected k <= logits.size(1) / num_groups * top_groups, got ", k, " and ", selectable);
    if (has_value(selection_bias)) {
        check_dim(kOp, {"selection_bias", *selection_bias}, 1);
        check_floating(kOp, {"selection_bias", *selection_bias});
        check_size(kOp, {"selection_bias.size(0)", selection_bias->sym_size(0)}, {"logits.size(1)", num_experts});
        check_same_device(kOp, {"logits", logits}, {{"selection_bias", *selection_bias}});
    }
}

void check_topk_gating_backward(const at::Tensor& grad_gates, const at::Tensor& logits, const at::Tensor& expert_ids,
                                std::string_view scoring) {
    constexpr const char* kOp = "_topk_gating_backward";
    parse_scoring(kOp, scoring);
    check_dim(kOp, {"logits", logits}, 2);
    check_floating(kOp, {"logits", logits});
    check_dim(kOp, {"grad_gates", grad_gates}, 2);
    check_floating(kOp, {"grad_gates", grad_gates});
    check_dim(kOp, {"expert_ids", expert_ids}, 2);
    TORCH_CHECK_TYPE(expert_ids.scalar_type() == at::kLong, "scattermoe::", kOp,
                     ": expected expert_ids to be int64, got ", expert_ids.scalar_type());
    check_size(kOp, {"grad_gates.size(0)", grad_gates.sym_size(0)}, {"logits.size(0)", logits.sym_size(0)});
    check_size(kOp, {"expert_ids.size(0)", expert_ids.sym_size(0)}, {"logits.size(0)", logits.sym_size(0)});
    check_size(kOp, {"expert_ids.size(1)", expert_ids.sym_size(1)}, {"grad_gates.size(1)", grad_gates.sym_size(1)});
    check_same_device(kOp, {"logits", logits}, {{"grad_gates", grad_gates}, {"expert_ids", expert_ids}});
}

namespace {

TORCH_LIBRARY_FRAGMENT(scattermoe, m) {
    m.def(
        "topk_gating(Tensor logits, SymInt k, str scoring='softmax', bool normalize=False, Tensor? "
        "selection_bias=None, "
        "SymInt num_groups=1, SymInt top_groups=1, float scale=1.0) -> (Tensor gates, Tensor expert_ids)",
        {at::Tag::pt2_compliant_tag});
    m.def(
        "_topk_gating_backward(Tensor grad_gates, Tensor logits, Tensor expert_ids, str scoring, bool normalize, "
        "float scale) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

}  // namespace

}  // namespace scattermoe
