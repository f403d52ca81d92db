#include "../topk_gating.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "support.h"

namespace scattermoe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct Options {
    std::string scoring;
    bool normalize;
    double scale;

    static auto fields(auto& self) { return std::tie(self.scoring, self.normalize, self.scale); }
};

// With p the scores of the selected experts and D = sum p + epsilon, the gates are c p, or c p / D normalised; the
// selection itself has no gradient. With G = dL/dgates:
//     dL/dp_j = c G_j,  or  c (G_j / D - sum_i G_i p_i / D^2)
//     dL/dlogit_e = p_e (dL/dp_e - sum_j dL/dp_j p_j)   softmax: every expert's logit moves the selected scores
//     dL/dlogit_e = p_e (1 - p_e) dL/dp_e               sigmoid
// Scoring the logits again is cheaper than keeping the scores.
class TopkGating : public torch::autograd::Function<TopkGating> {
  public:
    static constexpr bool is_traceable = true;
    static constexpr size_t kNumArguments = 6;

    static variable_list forward(AutogradContext* ctx, const Variable& logits, c10::SymInt k,
                                 const std::optional<Variable>& selection_bias, c10::SymInt num_groups,
                                 c10::SymInt top_groups, Options options) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        auto [gates, expert_ids] = topk_gating(logits, std::move(k), options.scoring, options.normalize, selection_bias,
                                               std::move(num_groups), std::move(top_groups), options.scale);
        ctx->save_for_backward({logits, expert_ids});
        save_options(ctx, options);
        ctx->set_materialize_grads(false);
        return {gates, expert_ids};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        variable_list result(kNumArguments);
        if (!grads[0].defined()) return result;
        const auto saved = ctx->get_saved_variables();
        const auto [scoring, normalize, scale] = load_options<Options>(ctx);
        result[0] = _topk_gating_backward(grads[0], saved[0], saved[1], scoring, normalize, scale);
        return result;
    }
};

// The first derivative, as a node of the graph that says no to a second one.
class TopkGatingBackward : public torch::autograd::Function<TopkGatingBackward> {
  public:
    static constexpr bool is_traceable = true;

    static Variable forward(AutogradContext* /*ctx*/, const Variable& grad_gates, const Variable& logits,
                            const Variable& expert_ids, Options options) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        return _topk_gating_backward(grad_gates, logits, expert_ids, options.scoring, options.normalize, options.scale);
    }

    static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*grads*/) {
        TORCH_CHECK(false, "scattermoe::topk_gating does not support second derivatives");
    }
};

std::tuple<at::Tensor, at::Tensor> topk_gating_autograd(const at::Tensor& logits, c10::SymInt k,
                                                        std::string_view scoring, bool normalize,
                                                        const std::optional<at::Tensor>& selection_bias,
                                                        c10::SymInt num_groups, c10::SymInt top_groups, double scale) {
    if (!has_derivative(logits)) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        return topk_gating(logits, std::move(k), scoring, normalize, selection_bias, std::move(num_groups),
                           std::move(top_groups), scale);
    }
    auto outputs = TopkGating::apply(logits, std::move(k), selection_bias, std::move(num_groups), std::move(top_groups),
                                     Options{std::string(scoring), normalize, scale});
    return {outputs[0], outputs[1]};
}

at::Tensor topk_gating_backward_autograd(const at::Tensor& grad_gates, const at::Tensor& logits,
                                         const at::Tensor& expert_ids, std::string_view scoring, bool normalize,
                                         double scale) {
    if (!any_has_derivative(grad_gates, logits)) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        return _topk_gating_backward(grad_gates, logits, expert_ids, scoring, normalize, scale);
    }
    return TopkGatingBackward::apply(grad_gates, logits, expert_ids, Options{std::string(scoring), normalize, scale});
}

TORCH_LIBRARY_IMPL(scattermoe, Autograd, m) {
    m.impl("topk_gating", TORCH_FN(topk_gating_autograd));
    m.impl("_topk_gating_backward", TORCH_FN(topk_gating_backward_autograd));
}

}  // namespace

}  // namespace scattermoe
