"""Experts with one weight for all of them, ``gate_up_proj`` (or ``up_proj``) and ``down_proj``, called with the router's choice.

This is how transformers holds experts. Those that take its experts interface are switched there (interface.py); here are the
others: models' own code, and classes of transformers without the interface.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..activations import GATED_ACTIVATIONS, GLU_LAYOUTS, PLAIN_ACTIVATIONS, activation_name
from .interface import takes_interface
from .recast import recast
from .registry import CannotReplace, register_block
from .trial import OtherOutputs, check_replacement

__all__: list[str] = []


class _Rule(NamedTuple):
    """How a class of experts reads its weights."""

    up_name: str
    transposed: bool
    activation: str | None  # None: the module's own _apply_gate or act_fn
    glu_layout: str = "gate_up"


class _FusedExperts(nn.Module):
    _rule: _Rule

    def forward(self, hidden_states: Tensor, *choice: Tensor, **named_choice: Tensor) -> Tensor:
        # Some pass the ids first, some the gates, and each under names of its own.
        first, second = (*choice, *named_choice.values())
        expert_ids, gates = (second, first) if first.is_floating_point() else (first, second)
        rule = self._rule
        up, down = getattr(self, rule.up_name), self.down_proj
        if rule.transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        own = self._apply_gate if hasattr(self, "_apply_gate") else getattr(self, "act_fn", None)
        return functional.moe_mlp(
            hidden_states,
            up,
            down,
            gates,
            functional.route(expert_ids, up.size(0)),
            rule.activation or own,
            up_bias=getattr(self, f"{rule.up_name}_bias", None),
            down_bias=getattr(self, "down_proj_bias", None),
            glu_layout=rule.glu_layout,
        )


def _up_name(module: nn.Module) -> str | None:
    return next((name for name in ("gate_up_proj", "up_proj") if module._parameters.get(name) is not None), None)


def _is_fused(module: nn.Module) -> bool:
    name = _up_name(module)
    if name is None or module._parameters.get("down_proj") is None or takes_interface(module):
        return False
    return module._parameters[name].dim() == 3 and len(inspect.signature(module.forward).parameters) == 3


def _run(module: nn.Module) -> Tensor:
    up, down = module._parameters[_up_name(module)], module.down_proj
    hidden_size = next(size for size in down.shape[1:] if size in up.shape[1:])
    choice = [torch.rand(12, up.size(0)).topk(min(2, up.size(0)))[1], torch.rand(12, min(2, up.size(0)))]
    if re.search("weight|score|prob|gate", list(inspect.signature(module.forward).parameters)[1]):
        choice.reverse()
    return module(torch.randn(12, hidden_size), *choice)


def _rules(module: nn.Module) -> Iterator[_Rule]:
    """What the module may mean by its weights, likely answers first."""
    name = _up_name(module)
    up, down = module._parameters[name].shape, module.down_proj.shape
    gated = name == "gate_up_proj"
    named = activation_name(getattr(module, "act_fn", None), gated=gated)
    likely = [named] if named else []
    known = [a for a in (GATED_ACTIVATIONS if gated else PLAIN_ACTIVATIONS) if a != named]
    for transposed in (False, True):
        rows, hidden, columns = (up[2], up[1], down[1]) if transposed else (up[1], up[2], down[2])
        if rows != (2 if gated else 1) * columns or hidden not in down:
            continue
        for activation in [*likely, None, *known]:
            if activation is None and not hasattr(module, "_apply_gate" if gated else "act_fn"):
                continue
            for glu_layout in GLU_LAYOUTS if gated and activation else GLU_LAYOUTS[:1]:
                yield _Rule(name, transposed, activation, glu_layout)


@register_block(_is_fused, name="experts with one weight for all")
def _convert(block: nn.Module) -> nn.Module:
    reason = "its weights have the shapes of neither [experts, out, in] nor [experts, in, out]"
    for rule in _rules(block):

        def convert(module: nn.Module, rule: _Rule = rule) -> nn.Module:
            new = recast(module, _FusedExperts)
            new._rule = rule
            return new

        try:
            check_replacement(block, convert, _run)
            return convert(block)
        except OtherOutputs as error:
            reason = str(error)
    raise CannotReplace(f"expected down(activation(gate_up(x))) with a known activation; in the last try: {reason}")
