#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "../export.h"

namespace scattermoe {

/// A whole expert MLP as one differentiable op:
///     y[t] = sum_j gates[t, j] (W_down[e] act(W_up[e] x[t] + b_up[e]) + b_down[e]),  e the expert of slot (t, j).
///
/// For backward it saves x, the pre-activations z, the gates, the routing and the weights and nothing else (the
/// activation-memory-minimal MoE of SonicMoE, arXiv 2512.14080); x only where w_up needs a gradient. With `recompute`
/// it saves x and not z.
///
/// @param x                [T, H]
/// @param w_up             [E, Z, H] with Z = 2 I for a gated activation and I for a plain one
/// @param b_up             [E, Z] or none
/// @param w_down           [E, H', I]
/// @param b_down           [E, H'] or none
/// @param gates            [T, K], any floating dtype
/// @param slot_order, slot_position, expert_offsets  from group_by_expert
/// @param activation       swiglu, geglu, geglu_tanh, reglu, swiglu_clamped (gated); silu, gelu, gelu_tanh, relu,
/// relu2, identity
/// @param glu_layout       gate_up, up_gate or interleaved: the order of w_up's rows where the activation is gated
/// @param alpha, limit     of swiglu_clamped (gpt-oss)
/// @param allow_tf32       float32 on a GPU: whether products may use TF32; none follows PyTorch's setting
/// @param recompute        keep x instead of z and compute z again in backward, at the cost of one more product
/// @return [T, H'], in the dtype of x
SCATTERMOE_API at::Tensor moe_mlp(const at::Tensor& x, const at::Tensor& w_up, const std::optional<at::Tensor>& b_up,
                                  const at::Tensor& w_down, const std::optional<at::Tensor>& b_down,
                                  const at::Tensor& gates, const at::Tensor& slot_order,
                                  const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                                  std::string_view activation = "swiglu", std::string_view glu_layout = "gate_up",
                                  double alpha = 1.702, double limit = 7.0,
                                  std::optional<bool> allow_tf32 = std::nullopt, bool recompute = false);

/// moe_mlp that also returns the pre-activations z [S, Z] in grouped order (zero for sentinels), for backward.
std::tuple<at::Tensor, at::Tensor> _moe_mlp_forward(const at::Tensor& x, const at::Tensor& w_up,
                                                    const std::optional<at::Tensor>& b_up, const at::Tensor& w_down,
                                                    const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                                                    const at::Tensor& slot_order, const at::Tensor& slot_position,
                                                    const at::Tensor& expert_offsets, std::string_view activation,
                                                    std::string_view glu_layout, double alpha, double limit,
                                                    std::optional<bool> allow_tf32);

/// Which gradients of moe_mlp a call of _moe_mlp_backward computes, in the order it returns them.
enum MoeMlpGrad : int { kGradX, kGradWUp, kGradBUp, kGradWDown, kGradBDown, kGradGates, kNumMoeMlpGrads };

using MoeMlpGrads = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// The gradients of moe_mlp; one that output_mask does not ask for is an empty tensor. x is only read for grad_w_up and
/// may be empty otherwise.
MoeMlpGrads _moe_mlp_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& w_up,
                              const at::Tensor& w_down, const std::optional<at::Tensor>& b_down,
                              const at::Tensor& gates, const at::Tensor& z, const at::Tensor& slot_order,
                              const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                              std::string_view activation, std::string_view glu_layout, double alpha, double limit,
                              std::optional<bool> allow_tf32, std::array<bool, kNumMoeMlpGrads> output_mask);

/// _moe_mlp_backward that may use the memory of z for its gradient, which is what keeps a training step's peak down; z
/// holds nothing of use afterwards.
MoeMlpGrads _moe_mlp_backward_over_z(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& w_up,
                                     const at::Tensor& w_down, const std::optional<at::Tensor>& b_down,
                                     const at::Tensor& gates, const at::Tensor& z, const at::Tensor& slot_order,
                                     const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                                     std::string_view activation, std::string_view glu_layout, double alpha,
                                     double limit, std::optional<bool> allow_tf32,
                                     std::array<bool, kNumMoeMlpGrads> output_mask);

void check_moe_mlp(const at::Tensor& x, const at::Tensor& w_up, const std::optional<at::Tensor>& b_up,
                   const at::Tensor& w_down, const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                   const at::Tensor& slot_order, const at::Tensor& slot_position, const at::Tensor& expert_offsets,
                   std::string_view activation, std::string_view glu_layout);

void check_moe_mlp_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& w_up,
                            const at::Tensor& w_down, const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                            const at::Tensor& z, const at::Tensor& slot_order, const at::Tensor& slot_position,
                            const at::Tensor& expert_offsets, std::string_view activation, std::string_view glu_layout,
                            const std::array<bool, kNumMoeMlpGrads>& output_mask);

}  // namespace scattermoe
