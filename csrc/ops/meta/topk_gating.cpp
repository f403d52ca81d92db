#include "../topk_gating.h"

#include <torch/library.h>

#include "../checks.h"

namespace scattermoe {

namespace {

std::tuple<at::Tensor, at::Tensor> topk_gating_meta(const at::Tensor& logits, c10::SymInt k, std::string_view scoring,
                                                    bool /*normalize*/, const std::optional<at::Tensor>& selection_bias,
                                                    c10::SymInt num_groups, c10::SymInt top_groups, double /*scale*/) {
    check_topk_gating(logits, k, scoring, selection_bias, num_groups, top_groups);
    const auto options = logits.options();
    return {at::empty_symint({logits.sym_size(0), k}, options.dtype(compute_dtype(logits.scalar_type()))),
            at::empty_symint({logits.sym_size(0), k}, options.dtype(at::kLong))};
}

at::Tensor topk_gating_backward_meta(const at::Tensor& grad_gates, const at::Tensor& logits,
                                     const at::Tensor& expert_ids, std::string_view scoring, bool /*normalize*/,
                                     double /*scale*/) {
    check_topk_gating_backward(grad_gates, logits, expert_ids, scoring);
    return at::empty_symint(logits.sym_sizes(), logits.options());
}

TORCH_LIBRARY_IMPL(scattermoe, Meta, m) {
    m.impl("topk_gating", TORCH_FN(topk_gating_meta));
    m.impl("_topk_gating_backward", TORCH_FN(topk_gating_backward_meta));
}

}  // namespace

}  // namespace scattermoe
