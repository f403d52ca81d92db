#include "../group_by_expert.h"

#include <torch/library.h>

#include "../checks.h"

namespace scattermoe {

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_by_expert_meta(const at::Tensor& expert_ids,
                                                                    c10::SymInt num_experts) {
    check_group_by_expert(expert_ids, num_experts);
    const auto options = expert_ids.options().dtype(at::kInt);
    return {at::empty_symint({expert_ids.sym_numel()}, options), at::empty_symint(expert_ids.sym_sizes(), options),
            at::empty_symint({num_experts + 1}, options)};
}

TORCH_LIBRARY_IMPL(scattermoe, Meta, m) {
    m.impl("group_by_expert", TORCH_FN(group_by_expert_meta));
}

}  // namespace

}  // namespace scattermoe
