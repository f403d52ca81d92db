"""Copies of ScatterMoE 0.3's modules that a model brings along: its classes are recognised by their signatures."""

from __future__ import annotations

import inspect

from torch import nn

from ..mlp import GLUMLP, MLP
from ..parallel_experts import ParallelExperts
from .recast import recast
from .registry import CannotReplace, register_block

__all__: list[str] = []


def _takes(module: nn.Module, methods: type[nn.Module], count: int) -> bool:
    wanted = list(inspect.signature(methods.forward).parameters)[1 : count + 1]
    return list(inspect.signature(module.forward).parameters)[:count] == wanted


def _is_parallel_experts(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 3 and _takes(module, ParallelExperts, count=5)


def _is_mlp(module: nn.Module) -> bool:
    experts = [module._modules.get(name) for name in ("experts", "output_experts")]
    return None not in experts and all(map(_is_parallel_experts, experts)) and _takes(module, MLP, count=3)


@register_block(_is_parallel_experts, name="ParallelExperts")
def _parallel_experts(block: nn.Module) -> nn.Module:
    new = recast(block, ParallelExperts)
    new._parameters.setdefault("bias", None)
    return new


@register_block(_is_mlp, name="MLP and GLUMLP")
def _mlp(block: nn.Module) -> nn.Module:
    up, down = block.experts.weight.shape, block.output_experts.weight.shape
    if up[1] not in (down[2], 2 * down[2]):
        raise CannotReplace(
            f"expected experts.weight.size(1) to be once or twice output_experts.weight.size(2), got {up[1]} and {down[2]}"
        )
    for name in ("top_k", "num_experts", "activation"):
        if not hasattr(block, name):
            raise CannotReplace(f"expected an attribute {name}, got a {type(block).__name__} without it")
    new = recast(block, MLP if up[1] == down[2] else GLUMLP)
    for name in ("experts", "output_experts"):
        new._modules[name] = _parallel_experts(block._modules[name])
    return new
