#pragma once

#include <ATen/ATen.h>

#include <string_view>
#include <tuple>

namespace scattermoe {

/// The activation of an expert MLP by itself, for MLPs that are put together from parallel_linear: h = act(z).
///
/// @param z                [S, 2 I] for a gated activation and [S, I] for a plain one
/// @param activation, glu_layout, alpha, limit  as in moe_mlp
/// @return [S, I]
at::Tensor _activation(const at::Tensor& z, std::string_view activation, std::string_view glu_layout, double alpha,
                       double limit);

/// What the backward pass of such an MLP needs of it, from the gradient dh of a row's h but for its gate g:
///     grad_z = g dh act'(z),  gated_hidden = g act(z),  grad_gates = <dh, act(z)>.
///
/// Rows are in grouped order; those of sentinels come back as zeros, whatever they and their gates hold.
///
/// @param grad_hidden      [S, I]
/// @param z                as in _activation, in the dtype of grad_hidden
/// @param gates            [T, K] with T K = S, any floating dtype
/// @param slot_order       int32 [S], from group_by_expert
/// @param expert_offsets   int32 [E + 1], from group_by_expert
/// @return grad_z like z, gated_hidden like grad_hidden, grad_gates like gates
std::tuple<at::Tensor, at::Tensor, at::Tensor> _activation_backward(
    const at::Tensor& grad_hidden, const at::Tensor& z, const at::Tensor& gates, const at::Tensor& slot_order,
    const at::Tensor& expert_offsets, std::string_view activation, std::string_view glu_layout, double alpha,
    double limit);

// The checks; they return the columns of h.
c10::SymInt check_activation(const at::Tensor& z, std::string_view activation, std::string_view glu_layout);
c10::SymInt check_activation_backward(const at::Tensor& grad_hidden, const at::Tensor& z, const at::Tensor& gates,
                                      const at::Tensor& slot_order, const at::Tensor& expert_offsets,
                                      std::string_view activation, std::string_view glu_layout);

}  // namespace scattermoe
