#include "group_by_expert.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "checks.h"

namespace scattermoe {

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_by_expert(const at::Tensor& expert_ids, c10::SymInt num_experts) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("scattermoe::group_by_expert", "")
                               .typed<decltype(group_by_expert)>();
    return op.call(expert_ids, std::move(num_experts));
}

void check_group_by_expert(const at::Tensor& expert_ids, const c10::SymInt& num_experts) {
    constexpr const char* kOp = "group_by_expert";
    check_defined(kOp, {"expert_ids", expert_ids});
    TORCH_CHECK_TYPE(at::isIntegralType(expert_ids.scalar_type(), /*includeBool=*/false), "scattermoe::", kOp,
                     ": expected expert_ids of an integer dtype, got ", expert_ids.scalar_type());
    TORCH_CHECK_VALUE(expert_ids.dim() == 1 || expert_ids.dim() == 2, "scattermoe::", kOp,
                      ": expected expert_ids of shape [T, K] or [T], got ", expert_ids.sym_sizes());
    if (expert_ids.dim() == 2) check_at_least(kOp, {"expert_ids.size(1)", expert_ids.sym_size(1)}, 1);
    check_at_most(kOp, {"expert_ids.numel()", expert_ids.sym_numel()}, kMaxSlots);
    check_at_least(kOp, {"num_experts", num_experts}, 1);
    check_at_most(kOp, {"num_experts", num_experts}, kMaxSlots - 1);
}

namespace {

TORCH_LIBRARY_FRAGMENT(scattermoe, m) {
    m.def(
        "group_by_expert(Tensor expert_ids, SymInt num_experts) "
        "-> (Tensor slot_order, Tensor slot_position, Tensor expert_offsets)",
        {at::Tag::pt2_compliant_tag});
}

}  // namespace

}  // namespace scattermoe
