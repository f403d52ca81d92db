"""Blocks of parallel experts, as in JetMoE and GraniteMoE: two layers, each with one weight ``[E, out, in]``.

Their router sorts the tokens and tells the host how many each expert got; the replaced one hands on what it chose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..activations import activation_name
from ..parallel_experts import ParallelExperts, is_bare
from .recast import recast
from .registry import CannotReplace, check_bypassed, register_block

__all__: list[str] = []

_LAYERS = ("input_linear", "output_linear")


class _Router(nn.Module):
    """Returns five values as before, the logits last, because transformers records those by their position."""

    def forward(self, hidden_states: Tensor) -> tuple[Any, ...]:
        logits = self.layer(hidden_states).float()
        gates, expert_ids = functional.topk_gating(logits, self.top_k, normalize=True)
        return functional.route(expert_ids, self.num_experts), None, gates, None, logits


class _MoE(nn.Module):
    def forward(self, layer_input: Tensor) -> Tensor:
        tokens = layer_input.reshape(-1, layer_input.size(-1))
        routing, _, gates, _, _ = self.router(tokens)
        name = activation_name(self.activation, gated=True)
        if name is not None and is_bare(self.input_linear) and is_bare(self.output_linear):
            y = functional.moe_mlp(tokens, self.input_linear.weight, self.output_linear.weight, gates, routing, name)
        else:
            gate, up = _apply(self.input_linear, tokens, routing).chunk(2, dim=-1)
            rows = _apply(self.output_linear, self.activation(gate) * up, routing, grouped_in=True)
            y = functional.combine(rows, gates, routing)
        return _add_bias(self, y.view(layer_input.shape))


class _MoA(nn.Module):
    """Query and output projections by expert; the attention between them stays the model's own."""

    def map(self, layer_input: Tensor) -> tuple[Tensor, Tensor, Any]:
        tokens = layer_input.reshape(-1, layer_input.size(-1))
        routing, _, gates, _, logits = self.router(tokens)
        queries = _apply(self.input_linear, tokens, routing, grouped_out=False)
        return queries.view(*layer_input.shape[:-1], routing.top_k, -1), logits, (routing, gates)

    def reduce(self, layer_input: Tensor, topo_info: Any) -> Tensor:
        routing, gates = topo_info
        rows = _apply(self.output_linear, layer_input.reshape(-1, layer_input.size(-1)), routing)
        return _add_bias(self, functional.combine(rows, gates, routing).view(*layer_input.shape[:-2], -1))


def _apply(
    layer: ParallelExperts,
    rows: Tensor,
    routing: functional.Routing,
    grouped_in: bool = False,
    grouped_out: bool = True,
) -> Tensor:
    if is_bare(layer):
        return functional.parallel_linear(rows, layer.weight, routing, grouped_in=grouped_in, grouped_out=grouped_out)
    # Adapters and hooks get the arguments of ParallelExperts.
    slots, ends = routing.slot_order, routing.expert_offsets[1:]
    experts = torch.bucketize(torch.arange(slots.size(0), device=slots.device, dtype=ends.dtype), ends, right=True)
    order = (experts, slots.long(), ends.long())
    top_k = 1 if rows.size(0) == slots.size(0) else routing.top_k
    return layer(rows, top_k, *order, grouped_in=grouped_in, grouped_out=grouped_out)


def _add_bias(block: nn.Module, y: Tensor) -> Tensor:
    bias = getattr(block, "bias", None)
    return y if bias is None else y + bias


def _is_parallel(module: nn.Module) -> bool:
    weights = [getattr(getattr(module, name, None), "weight", None) for name in _LAYERS]
    return all(isinstance(weight, Tensor) for weight in weights) and hasattr(module, "router")


def _is_moa(module: nn.Module) -> bool:
    return _is_parallel(module) and callable(getattr(module, "map", None)) and callable(getattr(module, "reduce", None))


def _convert(block: nn.Module, methods: type[nn.Module]) -> nn.Module:
    router = block.router
    for owner, name in [(router, "layer"), (router, "top_k"), (router, "num_experts")]:
        if not hasattr(owner, name):
            raise CannotReplace(f"expected router.{name}, got a {type(router).__name__} without it")
    for name in _LAYERS:
        layer = getattr(block, name)
        check_bypassed(name, layer)
        if (
            layer.weight.dim() != 3
            or layer.weight.size(0) != router.num_experts
            or getattr(layer, "bias", None) is not None
        ):
            raise CannotReplace(
                f"expected {name}.weight of shape [{router.num_experts}, out, in] and no bias, "
                f"got {list(layer.weight.shape)}"
            )
    new = recast(block, methods)
    new._modules["router"] = recast(router, _Router)
    for name in _LAYERS:
        new._modules[name] = recast(getattr(block, name), ParallelExperts)
        new._modules[name]._parameters.setdefault("bias", None)
    return new


@register_block(_is_parallel, name="expert MLPs in one operator", trial=lambda block: block(_tokens(block)))
def _moe(block: nn.Module) -> nn.Module:
    if not hasattr(block, "activation"):
        raise CannotReplace(f"expected an attribute activation, got a {type(block).__name__} without it")
    return _convert(block, _MoE)


def _run_moa(block: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    queries, logits, where = block.map(_tokens(block))
    return queries, logits, block.reduce(queries.sin(), where)


@register_block(_is_moa, name="query and output projections of attention experts without copies", trial=_run_moa)
def _moa(block: nn.Module) -> nn.Module:
    return _convert(block, _MoA)


def _tokens(block: nn.Module) -> Tensor:
    return torch.randn(2, 9, block.input_linear.weight.size(-1))
