#pragma once

// The public C++ interface: the functions of the Python package, differentiable like any ATen function.
//
//     auto [gates, expert_ids] = scattermoe::topk_gating(logits, /*k=*/2, {.normalize = true});
//     auto routing = scattermoe::route(expert_ids, num_experts);
//     auto y = scattermoe::moe_mlp(x, w_up, w_down, gates, routing, {.activation = "swiglu"});
//
// Rows are called scattered when row t * K + j belongs to the j-th choice of token t, and grouped when they are sorted
// by expert. No function moves tokens from one order to the other: they move indices. What does not fit is a c10::Error
// that names the argument, the rule and both values. The headers below declare the operators themselves, on which these
// functions stand: the same, with the routing's tensors one by one.

#include "ops/combine.h"
#include "ops/group_by_expert.h"
#include "ops/moe_mlp.h"
#include "ops/parallel_linear.h"
#include "ops/topk_gating.h"

namespace scattermoe {

/// Which expert gets which slot: the index tensors that every function here reads. T tokens with K choices each make
/// S = T * K slots; slot t * K + j is the j-th choice of token t.
struct Routing {
    at::Tensor slot_order;      ///< int32 [S], the slot at each grouped position
    at::Tensor slot_position;   ///< int32 [T, K], the grouped position of each slot; -1 for one that is in no group
    at::Tensor expert_offsets;  ///< int32 [E + 1]; expert e owns grouped positions [offsets[e], offsets[e + 1])

    int64_t num_tokens() const { return slot_position.size(0); }
    int64_t top_k() const { return slot_position.size(1); }
    int64_t num_experts() const { return expert_offsets.size(0) - 1; }
    /// int32 [E], the slots that each expert got.
    at::Tensor expert_counts() const { return expert_offsets.diff(); }
};

/// Sorts the slots of a routing by expert, on the device and without a host sync: a stable counting sort. An id outside
/// [0, num_experts) is a sentinel: its slot is in no group, contributes nothing and gets zero gradient.
///
/// @param expert_ids   [T, K] or [T] (one choice a token), any integer dtype
/// @param num_experts  E; may be smaller than K
/// @return the Routing, on the device of expert_ids
inline Routing route(const at::Tensor& expert_ids, int64_t num_experts) {
    auto [slot_order, slot_position, expert_offsets] = group_by_expert(expert_ids, num_experts);
    if (slot_position.dim() == 1) slot_position = slot_position.unsqueeze(1);
    return {slot_order, slot_position, expert_offsets};
}

/// Applies each slot's expert to its row: y[s] = x[row(s)] weight[e(s)]^T + bias[e(s)] (ParallelLinear of ScatterMoE,
/// arXiv 2403.08245). It can be differentiated any number of times.
///
/// @param x            scattered rows, [T, in] (one a token, read by its K slots) or [T * K, in] (one a slot); with
///                     grouped_in one a slot in grouped order. float64, float32, bfloat16 or float16
/// @param weight       [E, out, in] in the dtype of x; a transposed view of [E, in, out] is read without a copy
/// @param routing      from route
/// @param bias         [E, out] or none
/// @param grouped_in   whether the rows of x are in grouped order
/// @param grouped_out  whether to return rows in grouped order
/// @param allow_tf32   float32 on a GPU: whether products may use TF32; none follows PyTorch's setting
/// @return [T * K, out] in the dtype of x; rows of sentinel slots are zero
inline at::Tensor parallel_linear(const at::Tensor& x, const at::Tensor& weight, const Routing& routing,
                                  const std::optional<at::Tensor>& bias = std::nullopt, bool grouped_in = false,
                                  bool grouped_out = false, std::optional<bool> allow_tf32 = std::nullopt) {
    // One row a token where that is how many there are; with K = 1 both readings agree.
    const bool row_per_token = !grouped_in && x.dim() > 0 && x.size(0) == routing.num_tokens();
    return parallel_linear(x, weight, bias, routing.slot_order, routing.expert_offsets,
                           row_per_token ? routing.top_k() : 1, grouped_in, grouped_out, allow_tf32);
}

/// Sums the K rows of each token, weighted by their gates: y[t] = sum_j gates[t, j] * row(t, j). Sums are accumulated
/// in float32 (float64 for float64). A sentinel slot is skipped whatever its gate and its row hold. It can be
/// differentiated any number of times.
///
/// @param rows     [T * K, H], in grouped order or (grouped = false) in scattered order
/// @param gates    [T, K], any floating dtype; none means ones
/// @param routing  from route
/// @return [T, H] in the dtype of rows
inline at::Tensor combine(const at::Tensor& rows, const std::optional<at::Tensor>& gates, const Routing& routing,
                          bool grouped = true) {
    return combine(rows, gates, routing.slot_order, routing.slot_position, grouped);
}

struct MoeMlpOptions {
    std::string_view activation = "swiglu";    ///< gated: swiglu, geglu, geglu_tanh, reglu, swiglu_clamped;
                                               ///< plain: silu, gelu, gelu_tanh, relu, relu2, identity
    std::string_view glu_layout = "gate_up";   ///< gate_up, up_gate or interleaved: the order of w_up's rows
    std::optional<at::Tensor> up_bias = {};    ///< [E, 2 I] or [E, I]
    std::optional<at::Tensor> down_bias = {};  ///< [E, H']
    double alpha = 1.702;                      ///< slope of swiglu_clamped
    double limit = 7.0;                        ///< clamp of swiglu_clamped
    bool recompute = false;                    ///< keep x alone for backward, for one more product there
    std::optional<bool> allow_tf32 = {};       ///< float32 on a GPU: none follows PyTorch's setting
};

/// Computes a whole mixture-of-experts MLP as one differentiable op with the least saved state (SonicMoE, arXiv
/// 2512.14080): y[t] = sum_j gates[t, j] (w_down[e] act(w_up[e] x[t] + up_bias[e]) + down_bias[e]) with e the expert of
/// slot (t, j). Only gradients that are asked for are computed. A second derivative is an error; parallel_linear and
/// combine have it.
///
/// @param x        [T, H]; float64, float32, bfloat16 or float16
/// @param w_up     [E, 2 I, H] for a gated activation and [E, I, H] for a plain one, in the dtype of x
/// @param w_down   [E, H', I]; both weights may be transposed views
/// @param gates    [T, K], any floating dtype; float32 gates are not rounded, and get a float32 gradient
/// @param routing  from route
/// @return [T, H'] in the dtype of x
inline at::Tensor moe_mlp(const at::Tensor& x, const at::Tensor& w_up, const at::Tensor& w_down,
                          const at::Tensor& gates, const Routing& routing, const MoeMlpOptions& options = {}) {
    return moe_mlp(x, w_up, options.up_bias, w_down, options.down_bias, gates, routing.slot_order,
                   routing.slot_position, routing.expert_offsets, options.activation, options.glu_layout, options.alpha,
                   options.limit, options.allow_tf32, options.recompute);
}

struct TopkGatingOptions {
    std::string_view scoring = "softmax";           ///< softmax (over all experts, before the selection) or sigmoid
    bool normalize = false;                         ///< divide the gates of a token by their sum
    std::optional<at::Tensor> selection_bias = {};  ///< [E], added to the scores for the selection alone; no gradient
    int64_t num_groups = 1;                         ///< the experts form this many equal groups ...
    int64_t top_groups = 1;                         ///< ... and only those in the best top_groups groups can be picked
    double scale = 1.0;                             ///< factor on the gates
};

/// topk_gating with its options by name: scores the experts, picks the best k of each token and returns their gates, in
/// one pass and in float32 (float64 for float64 logits).
///
/// @param logits  [T, E], any floating dtype
/// @param k       experts per token, at most E
/// @return gates [T, k], descending, and expert_ids int64 [T, k], distinct and valid even where logits are NaN
inline std::tuple<at::Tensor, at::Tensor> topk_gating(const at::Tensor& logits, int64_t k,
                                                      const TopkGatingOptions& options) {
    return topk_gating(logits, k, options.scoring, options.normalize, options.selection_bias, options.num_groups,
                       options.top_groups, options.scale);
}

}  // namespace scattermoe
