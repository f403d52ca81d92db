#pragma once

// The public C++ interface: the functions behind `torch.ops.scattermoe`, differentiable like any ATen function.
//
//     auto routing = scattermoe::group_by_expert(expert_ids, num_experts);
//     auto y = scattermoe::moe_mlp(x, w_up, std::nullopt, w_down, std::nullopt, gates, slot_order, slot_position, ...);

#include "ops/combine.h"
#include "ops/group_by_expert.h"
#include "ops/moe_mlp.h"
#include "ops/parallel_linear.h"
#include "ops/topk_gating.h"
