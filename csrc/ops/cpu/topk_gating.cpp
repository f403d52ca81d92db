#include "../topk_gating.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "row_kernels.h"

namespace scattermoe {

namespace {

constexpr int64_t kElementsPerTask = 1 << 13;

int64_t tokens_per_task(int64_t num_experts) {
    return std::max<int64_t>(1, kElementsPerTask / num_experts);
}

// scores[e] of one token. A NaN logit makes a softmax row NaN and a sigmoid score NaN.
template <typename T>
void score_row(Scoring scoring, cpu::Compute<T>* scores, const T* logits, int64_t num_experts) {
    using C = cpu::Compute<T>;
    if (scoring == Scoring::kSigmoid) {
        for (int64_t e = 0; e < num_experts; ++e)
            scores[e] = activation_math::sigmoid(static_cast<C>(logits[e]));
        return;
    }
    C max = -std::numeric_limits<C>::infinity();
    for (int64_t e = 0; e < num_experts; ++e)
        max = std::max(max, static_cast<C>(logits[e]));
    C sum = C(0);
    for (int64_t e = 0; e < num_experts; ++e) {
        scores[e] = std::exp(static_cast<C>(logits[e]) - max);
        sum += scores[e];
    }
    for (int64_t e = 0; e < num_experts; ++e)
        scores[e] /= sum;
}

// A strict weak order for descending values: NaN before every number as in torch.topk, equal values by index.
template <typename C>
struct Descending {
    const C* values;
    bool operator()(int64_t a, int64_t b) const {
        const bool a_nan = std::isnan(values[a]), b_nan = std::isnan(values[b]);
        if (a_nan || b_nan) return a_nan != b_nan ? a_nan : a < b;
        return values[a] != values[b] ? values[a] > values[b] : a < b;
    }
};

// Keeps in `candidates` the experts of the best groups, in ascending order.
template <typename C>
void keep_best_groups(std::vector<int64_t>& candidates, const C* selection, int64_t num_experts, int64_t num_groups,
                      int64_t top_groups, bool biased) {
    const int64_t group_size = num_experts / num_groups;
    std::vector<C> group_scores(num_groups);
    std::vector<int64_t> groups(num_groups), members(group_size);
    for (int64_t group = 0; group < num_groups; ++group) {
        const C* scores = selection + group * group_size;
        std::iota(members.begin(), members.end(), 0);
        const int64_t best = std::min<int64_t>(biased ? 2 : 1, group_size);
        std::partial_sort(members.begin(), members.begin() + best, members.end(), Descending<C>{scores});
        C sum = scores[members[0]];
        if (best == 2) sum += scores[members[1]];
        group_scores[group] = sum;
    }
    std::iota(groups.begin(), groups.end(), 0);
    std::partial_sort(groups.begin(), groups.begin() + top_groups, groups.end(), Descending<C>{group_scores.data()});
    std::sort(groups.begin(), groups.begin() + top_groups);
    candidates.clear();
    for (int64_t i = 0; i < top_groups; ++i) {
        for (int64_t e = 0; e < group_size; ++e)
            candidates.push_back(groups[i] * group_size + e);
    }
}

std::tuple<at::Tensor, at::Tensor> topk_gating_cpu(const at::Tensor& logits, c10::SymInt k_, std::string_view scoring_,
                                                   bool normalize, const std::optional<at::Tensor>& selection_bias,
                                                   c10::SymInt num_groups_, c10::SymInt top_groups_, double scale) {
    check_topk_gating(logits, k_, scoring_, selection_bias, num_groups_, top_groups_);
    const Scoring scoring = parse_scoring("topk_gating", scoring_);
    const int64_t k = k_.expect_int(), num_groups = num_groups_.expect_int(), top_groups = top_groups_.expect_int();
    const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
    const at::ScalarType dtype = compute_dtype(logits.scalar_type());
    const at::Tensor logits_ = logits.contiguous();
    const at::Tensor bias_ = has_value(selection_bias) ? selection_bias->to(dtype).contiguous() : at::Tensor();
    at::Tensor gates = at::empty({num_tokens, k}, logits.options().dtype(dtype));
    at::Tensor expert_ids = at::empty({num_tokens, k}, logits.options().dtype(at::kLong));

    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "topk_gating", [&] {
        using C = cpu::Compute<scalar_t>;
        const scalar_t* logit = logits_.const_data_ptr<scalar_t>();
        const C* bias = bias_.defined() ? bias_.const_data_ptr<C>() : nullptr;
        C* gate_out = gates.mutable_data_ptr<C>();
        int64_t* id_out = expert_ids.mutable_data_ptr<int64_t>();
        at::parallel_for(0, num_tokens, tokens_per_task(num_experts), [&](int64_t begin, int64_t end) {
            std::vector<C> scores(num_experts), biased_scores(bias ? num_experts : 0);
            std::vector<int64_t> candidates(num_experts);
            for (int64_t token = begin; token < end; ++token) {
                score_row<scalar_t>(scoring, scores.data(), logit + token * num_experts, num_experts);
                const C* selection = scores.data();
                if (bias) {
                    for (int64_t e = 0; e < num_experts; ++e)
                        biased_scores[e] = scores[e] + bias[e];
                    selection = biased_scores.data();
                }
                candidates.resize(num_experts);
                std::iota(candidates.begin(), candidates.end(), 0);
                if (top_groups < num_groups) {
                    keep_best_groups(candidates, selection, num_experts, num_groups, top_groups, bias != nullptr);
                }
                std::partial_sort(candidates.begin(), candidates.begin() + k, candidates.end(),
                                  Descending<C>{selection});
                // The bias decides who is selected, the score alone who comes first.
                if (bias) std::sort(candidates.begin(), candidates.begin() + k, Descending<C>{scores.data()});

                C sum = C(0);
                for (int64_t j = 0; j < k; ++j)
                    sum += scores[candidates[j]];
                const C factor = static_cast<C>(scale) / (normalize ? sum + static_cast<C>(kNormalizeEpsilon) : C(1));
                for (int64_t j = 0; j < k; ++j) {
                    gate_out[token * k + j] = scores[candidates[j]] * factor;
                    id_out[token * k + j] = candidates[j];
                }
            }
        });
    });
    return {gates, expert_ids};
}

at::Tensor topk_gating_backward_cpu(const at::Tensor& grad_gates, const at::Tensor& logits,
                                    const at::Tensor& expert_ids, std::string_view scoring_, bool normalize,
                                    double scale) {
    check_topk_gating_backward(grad_gates, logits, expert_ids, scoring_);
    const Scoring scoring = parse_scoring("_topk_gating_backward", scoring_);
    const int64_t num_tokens = logits.size(0), num_experts = logits.size(1), k = expert_ids.size(1);
    const at::Tensor logits_ = logits.contiguous();
    const at::Tensor ids_ = expert_ids.contiguous();
    const at::Tensor grad_ = grad_gates.to(compute_dtype(logits.scalar_type())).contiguous();
    at::Tensor grad_logits = at::empty(logits.sizes(), logits.options());

    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "_topk_gating_backward", [&] {
        using C = cpu::Compute<scalar_t>;
        const scalar_t* logit = logits_.const_data_ptr<scalar_t>();
        const int64_t* ids = ids_.const_data_ptr<int64_t>();
        const C* grad = grad_.const_data_ptr<C>();
        scalar_t* out = grad_logits.mutable_data_ptr<scalar_t>();
        const C factor = static_cast<C>(scale);
        at::parallel_for(0, num_tokens, tokens_per_task(num_experts), [&](int64_t begin, int64_t end) {
            std::vector<C> scores(num_experts), grad_scores(num_experts);
            for (int64_t token = begin; token < end; ++token) {
                const int64_t* token_ids = ids + token * k;
                const C* token_grad = grad + token * k;
                score_row<scalar_t>(scoring, scores.data(), logit + token * num_experts, num_experts);

                C sum = C(0), weighted = C(0);
                for (int64_t j = 0; j < k; ++j) {
                    TORCH_CHECK_INDEX(token_ids[j] >= 0 && token_ids[j] < num_experts,
                                      "scattermoe::_topk_gating_backward: expected expert_ids in [0, ", num_experts,
                                      "), got ", token_ids[j]);
                    sum += scores[token_ids[j]];
                    weighted += token_grad[j] * scores[token_ids[j]];
                }
                const C denominator = sum + static_cast<C>(kNormalizeEpsilon);
                std::fill(grad_scores.begin(), grad_scores.end(), C(0));
                C mean = C(0);  // sum_j dL/dp_j p_j, the part of a softmax's gradient that every expert shares
                for (int64_t j = 0; j < k; ++j) {
                    C& grad_score = grad_scores[token_ids[j]];
                    grad_score = normalize ? factor * (token_grad[j] - weighted / denominator) / denominator
                                           : factor * token_grad[j];
                    mean += grad_score * scores[token_ids[j]];
                }
                scalar_t* token_out = out + token * num_experts;
                for (int64_t e = 0; e < num_experts; ++e) {
                    const C p = scores[e];
                    token_out[e] = static_cast<scalar_t>(
                        scoring == Scoring::kSoftmax ? p * (grad_scores[e] - mean) : p * (C(1) - p) * grad_scores[e]);
                }
            }
        });
    });
    return grad_logits;
}

TORCH_LIBRARY_IMPL(scattermoe, CPU, m) {
    m.impl("topk_gating", TORCH_FN(topk_gating_cpu));
    m.impl("_topk_gating_backward", TORCH_FN(topk_gating_backward_cpu));
}

}  // namespace

}  // namespace scattermoe
