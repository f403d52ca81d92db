#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>

#include "../export.h"

namespace scattermoe {

/// Gathers the K rows of each token and sums them, weighted by their gates: y[t] = sum_j gates[t, j] * row(t, j).
/// Sums are accumulated in float32 (float64 for float64). Sentinel slots are skipped, whatever their gate and row hold.
///
/// @param rows           [S, H], in grouped order or (grouped = false) in scattered order
/// @param gates          [T, K], any floating dtype; none means ones
/// @param slot_order     int32 [S], from group_by_expert
/// @param slot_position  int32 [T, K], from group_by_expert
/// @return [T, H], in the dtype of rows
SCATTERMOE_API at::Tensor combine(const at::Tensor& rows, const std::optional<at::Tensor>& gates,
                                  const at::Tensor& slot_order, const at::Tensor& slot_position, bool grouped = true);

/// The gradients of combine for rows (in their order, zero for sentinels) and gates (in the gates' dtype, zero for
/// sentinels); one that output_mask does not ask for is an empty tensor. rows is only read for grad_gates and may be
/// empty otherwise.
std::tuple<at::Tensor, at::Tensor> _combine_backward(const at::Tensor& grad, const at::Tensor& rows,
                                                     const std::optional<at::Tensor>& gates,
                                                     const at::Tensor& slot_order, const at::Tensor& slot_position,
                                                     bool grouped, std::array<bool, 2> output_mask);

void check_combine(const at::Tensor& rows, const std::optional<at::Tensor>& gates, const at::Tensor& slot_order,
                   const at::Tensor& slot_position);

void check_combine_backward(const at::Tensor& grad, const at::Tensor& rows, const std::optional<at::Tensor>& gates,
                            const at::Tensor& slot_order, const at::Tensor& slot_position,
                            const std::array<bool, 2>& output_mask);

}  // namespace scattermoe
