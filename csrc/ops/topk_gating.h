#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "../export.h"
#include "../kernels/scoring.h"

namespace scattermoe {

/// Scores the experts, picks the best k of each token and returns their gates, in one pass and in float32 (float64 for
/// float64 logits).
///
/// @param logits          [T, E]
/// @param k               experts per token, at most E
/// @param scoring         softmax (over all experts, before the selection) or sigmoid
/// @param normalize       divide the gates of a token by their sum
/// @param selection_bias  [E]: added to the scores for the selection alone (DeepSeek-V3, arXiv 2412.19437); no gradient
/// @param num_groups      the experts form this many equal groups ...
/// @param top_groups      ... and only those in the best top_groups groups can be picked. A group scores its best
/// expert
///                        (DeepSeek-V2) or, with a selection bias, the sum of its two best (DeepSeek-V3)
/// @param scale           factor on the gates
/// @return gates [T, k], descending, and expert_ids int64 [T, k], distinct and valid even where logits are NaN. Equal
///         scores go to the lower expert id.
SCATTERMOE_API std::tuple<at::Tensor, at::Tensor> topk_gating(
    const at::Tensor& logits, c10::SymInt k, std::string_view scoring = "softmax", bool normalize = false,
    const std::optional<at::Tensor>& selection_bias = std::nullopt, c10::SymInt num_groups = 1,
    c10::SymInt top_groups = 1, double scale = 1.0);

/// The gradient of topk_gating for the logits, which it scores again.
at::Tensor _topk_gating_backward(const at::Tensor& grad_gates, const at::Tensor& logits, const at::Tensor& expert_ids,
                                 std::string_view scoring, bool normalize, double scale);

Scoring parse_scoring(const char* op, std::string_view name);

void check_topk_gating(const at::Tensor& logits, const c10::SymInt& k, std::string_view scoring,
                       const std::optional<at::Tensor>& selection_bias, const c10::SymInt& num_groups,
                       const c10::SymInt& top_groups);

void check_topk_gating_backward(const at::Tensor& grad_gates, const at::Tensor& logits, const at::Tensor& expert_ids,
                                std::string_view scoring);

}  // namespace scattermoe
