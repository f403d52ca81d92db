"""Blocks of transformers outside its experts interface that are like no others: Llama 4, DBRX and Aria, known by their names.

That a class of that name is the one meant is found out by the trial run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..activations import activation_name
from .interface import takes_interface
from .recast import recast
from .registry import check_bypassed, register_block

__all__: list[str] = []


def _named(name: str) -> Callable[[nn.Module], bool]:
    # Newer transformers may have given the class the interface, which is served without a swap.
    return lambda module: type(module).__name__ == name and not takes_interface(module)


class _Llama4(nn.Module):
    """Gates scale what goes into an expert. The model's own code runs every expert on every token, most of them on zeros."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        tokens = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(tokens)
        gates, expert_ids = scores.topk(self.top_k)
        rows = (tokens.unsqueeze(1) * gates.unsqueeze(2)).flatten(0, 1)
        up, down = self.experts.gate_up_proj.transpose(1, 2), self.experts.down_proj.transpose(1, 2)
        routing = functional.route(expert_ids.flatten(), self.num_experts)
        activation = activation_name(self.experts.act_fn, gated=True) or self._glu
        y = functional.moe_mlp(rows, up, down, torch.ones_like(gates).view(-1, 1), routing, activation)
        return self.shared_expert(tokens) + y.view(*gates.shape, -1).sum(1), logits

    def _glu(self, z: Tensor) -> Tensor:
        gate, up = z.chunk(2, dim=-1)
        return self.experts.act_fn(gate) * up


@register_block(
    _named("Llama4TextMoe"),
    name="Llama 4: top-k experts instead of all",
    trial=lambda block: block(torch.randn(2, 9, block.hidden_dim)),
)
def _llama4(block: nn.Module) -> nn.Module:
    check_bypassed("experts", block.experts)
    return recast(block, _Llama4)


class _Dbrx(nn.Module):
    """Three weights ``[E * I, H]``."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens = hidden_states.reshape(-1, self.hidden_size)
        shape = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
        gate, up, down = (weight.view(shape) for weight in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
        routing = functional.route(top_k_index, self.num_experts)
        gated = self.mlp.activation_fn(functional.parallel_linear(tokens, gate, routing, grouped_out=True))
        hidden = gated * functional.parallel_linear(tokens, up, routing, grouped_out=True)
        rows = functional.parallel_linear(hidden, down.transpose(1, 2), routing, grouped_in=True, grouped_out=True)
        y = functional.combine(rows, top_k_weights, routing)
        return y.view(hidden_states.shape[0], -1, self.hidden_size)


def _run_dbrx(block: nn.Module) -> Tensor:
    gates, expert_ids = torch.rand(18, block.num_experts).topk(min(2, block.num_experts))
    return block(torch.randn(2, 9, block.hidden_size), expert_ids, gates)


@register_block(_named("DbrxExperts"), name="DBRX's experts", trial=_run_dbrx)
def _dbrx(block: nn.Module) -> nn.Module:
    check_bypassed("mlp", block.mlp)
    return recast(block, _Dbrx)


class _Aria(nn.Module):
    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        expert_ids, gates = self.route_tokens_to_experts(router_logits)
        up, down = self.fc1.weight.transpose(1, 2), self.fc2.weight.transpose(1, 2)
        routing = functional.route(expert_ids, up.size(0))
        return functional.moe_mlp(hidden_states, up, down, gates, routing, "swiglu")


def _run_aria(block: nn.Module) -> Any:
    experts, hidden_size, _ = block.fc1.weight.shape
    return block(torch.randn(9, hidden_size), torch.randn(9, experts))


@register_block(_named("AriaExperts"), name="Aria's experts", trial=_run_aria)
def _aria(block: nn.Module) -> nn.Module:
    check_bypassed("fc1", block.fc1)
    check_bypassed("fc2", block.fc2)
    return recast(block, _Aria)
