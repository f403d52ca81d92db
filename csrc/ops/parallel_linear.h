#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>

#include "../export.h"

namespace scattermoe {

/// The scattered grouped GEMM: each slot's row of x times its expert's weight, y[s] = x[row(s)] W[e(s)]^T + b[e(s)]
/// (ParallelLinear of ScatterMoE, arXiv 2403.08245).
///
/// Rows are read where they lie and written where they belong, in scattered order (slot s is row s) or in grouped order
/// (rows sorted by expert). Sentinel rows of the output are zero.
///
/// @param x               scattered: [S / top_k, in], slot s reads row s / top_k; grouped_in: [S, in] and top_k = 1
/// @param weight          [E, out, in], any strides; a transposed view of [E, in, out] is read in place
/// @param bias            [E, out] or none
/// @param slot_order      int32 [S], from group_by_expert
/// @param expert_offsets  int32 [E + 1], from group_by_expert
/// @param allow_tf32      float32 on a GPU: whether products may use TF32; none follows PyTorch's setting
/// @return [S, out], scattered or (grouped_out) grouped
SCATTERMOE_API at::Tensor parallel_linear(const at::Tensor& x, const at::Tensor& weight,
                                          const std::optional<at::Tensor>& bias, const at::Tensor& slot_order,
                                          const at::Tensor& expert_offsets, c10::SymInt top_k, bool grouped_in = false,
                                          bool grouped_out = false, std::optional<bool> allow_tf32 = std::nullopt);

/// The gradients of parallel_linear for x, weight and bias; one that output_mask does not ask for is an empty tensor.
/// x is only read for grad_weight and may be empty otherwise. grad_weight has the strides of weight.
std::tuple<at::Tensor, at::Tensor, at::Tensor> _parallel_linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& slot_order,
    const at::Tensor& expert_offsets, c10::SymInt top_k, bool grouped_in, bool grouped_out,
    std::optional<bool> allow_tf32, std::array<bool, 3> output_mask);

void check_parallel_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           const at::Tensor& slot_order, const at::Tensor& expert_offsets, const c10::SymInt& top_k,
                           bool grouped_in);

void check_parallel_linear_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                    const at::Tensor& slot_order, const at::Tensor& expert_offsets,
                                    const c10::SymInt& top_k, bool grouped_in, const std::array<bool, 3>& output_mask);

}  // namespace scattermoe
