#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "../export.h"

namespace scattermoe {

/// Sorts the slots of a routing by expert: the indices that every other op reads instead of moving tokens.
///
/// A slot is one assignment of a token to an expert: slot s = t * K + j is the j-th choice of token t. The sort is a
/// stable counting sort. Ids outside [0, num_experts) are sentinels: their slots come last, in slot order, and are in
/// no group.
///
/// @param expert_ids   [T, K] or [T], any integer dtype
/// @param num_experts  E
/// @return slot_order int32 [S]: the slot at each grouped position;
///         slot_position int32, shaped like expert_ids: the grouped position of each slot, -1 for a sentinel;
///         expert_offsets int32 [E + 1]: expert e owns grouped positions [offsets[e], offsets[e + 1])
SCATTERMOE_API std::tuple<at::Tensor, at::Tensor, at::Tensor> group_by_expert(const at::Tensor& expert_ids,
                                                                              c10::SymInt num_experts);

void check_group_by_expert(const at::Tensor& expert_ids, const c10::SymInt& num_experts);

}  // namespace scattermoe
