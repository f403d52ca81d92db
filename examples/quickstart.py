"""The quick start of the README: an MoE layer as a module, and the same from functions."""

import torch

import scattermoe

moe = scattermoe.MoE(hidden_size=256, intermediate_size=512, num_experts=16, top_k=2)
y, aux = moe(torch.randn(4, 128, 256))
loss = y.square().mean() + 0.01 * aux.load_balancing_loss + 0.001 * aux.z_loss
loss.backward()
print("module:", tuple(y.shape), "slots of each expert:", aux.expert_load.tolist())

# The same with functions: route once, then use the routing for any number of per-expert linear maps.
x, logits = torch.randn(512, 256), torch.randn(512, 16)
w_up, w_down = torch.randn(16, 1024, 256) / 16, torch.randn(16, 256, 512) / 16
gates, expert_ids = scattermoe.topk_gating(logits, k=2, normalize=True)
routing = scattermoe.route(expert_ids, num_experts=16)
y = scattermoe.moe_mlp(x, w_up, w_down, gates, routing, activation="swiglu")
print("fused MLP:", tuple(y.shape))

rows = scattermoe.parallel_linear(x, w_up, routing, grouped_out=True)  # [1024, 1024], sorted by expert
summed = scattermoe.combine(rows, gates, routing)  # [512, 1024], one row a token
print("one linear map per expert:", tuple(rows.shape), "summed over each token's experts:", tuple(summed.shape))
