"""Blocks with one module per expert, run one after another: Mixtral as it was published, and most models written by hand.

The experts' weights are stacked, the only copy that :func:`scattermoe.replace_moe` makes; the state dict still names them one by
one. What a block does around its experts is not read but found out: known rules are tried until one gives the block's own outputs
on random tokens and weights.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from .formula import check_experts, find_formula
from .recast import recast, shallow_copy
from .registry import CannotReplace, register_block
from .stacked import StackedExperts
from .trial import OtherOutputs, compare, quiet, trial_copy

__all__: list[str] = []

_TOKENS = 256  # of a trial run: enough to fill an expert whose tokens are limited


class _Rule(NamedTuple):
    """What a block does around its experts.

    Attributes:
        experts: name of the submodule that holds the experts.
        router: name of the router.
        choice: where a router's outputs have the ids and the gates; None for a linear layer, which only has logits.
        flat: the router gets tokens ``[T, H]``.
        top_k: experts per token, for logits.
        scoring: ``"softmax"`` or ``"sigmoid"``, for logits.
        normalize: make a token's gates add up to one, for logits.
        shared: name of the expert that sees every token, or None.
        shared_gate: name of the linear layer whose sigmoid scales the shared expert, or None.
        logits_too: the block returns the router's logits beside the tokens.
    """

    experts: str
    router: str
    choice: tuple[int, int] | None = None
    flat: bool = True
    top_k: int = 0
    scoring: str = "softmax"
    normalize: bool = False
    shared: str | None = None
    shared_gate: str | None = None
    logits_too: bool = False


class _LoopBlock(nn.Module):
    _rule: _Rule

    def forward(self, *tokens: Tensor, **named_tokens: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        (hidden_states,) = (*tokens, *named_tokens.values())  # under whatever name
        rule = self._rule
        experts, router = getattr(self, rule.experts), getattr(self, rule.router)
        tokens = hidden_states.reshape(-1, hidden_states.size(-1))
        scored = tokens if rule.flat else hidden_states
        scores = router(scored.to(next(router.parameters()).dtype))  # routers may be kept in float32
        if rule.choice is None:
            gates, expert_ids = functional.topk_gating(scores, rule.top_k, rule.scoring, rule.normalize)
        else:
            expert_ids, gates = (scores[position].flatten(0, -2) for position in rule.choice)
        y = experts(tokens, gates, functional.route(expert_ids, experts.num_experts))
        if rule.shared is not None:
            shared = getattr(self, rule.shared)(tokens)
            if rule.shared_gate is not None:
                shared = getattr(self, rule.shared_gate)(tokens).sigmoid() * shared
            y = y + shared
        y = y.view(hidden_states.shape)
        return (y, scores) if rule.logits_too else y


def _experts_name(block: nn.Module) -> str | None:
    for name, child in block._modules.items():
        named = re.search("expert", f"{name} {type(child).__name__}", re.IGNORECASE)
        if named and isinstance(child, nn.ModuleList | nn.ModuleDict) and len(child) > 0:
            return name
    return None


@register_block(lambda module: _experts_name(module) is not None, name="experts of a loop, stacked")
def _convert(block: nn.Module) -> nn.Module:
    name = _experts_name(block)
    container = block._modules[name]
    if len(inspect.signature(block.forward).parameters) != 1:
        raise CannotReplace(f"expected a forward of the tokens alone, got {inspect.signature(block.forward)}")
    check_experts(name, container)
    layout, activation = find_formula(name, container)
    hidden_size = next(container.children()).get_submodule(layout.down).out_features
    rule = _find_rule(block, name, hidden_size)
    new = recast(block, _LoopBlock)
    new._rule = rule
    new._modules[name] = StackedExperts(container, layout, activation)
    return new


# ---- What is around the experts --------------------------------------------------------------------------------------


class _StandIn(nn.Module):
    """In trial runs, in place of an expert: cheap, nonlinear, and different for each."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x + self.index)


class _StandInExperts(nn.Module):
    """The same for :class:`StackedExperts`."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, tokens: Tensor, gates: Tensor, routing: functional.Routing) -> Tensor:
        counts = routing.expert_offsets.diff()
        slots = routing.slot_order[: int(counts.sum())].long()
        expert = torch.arange(self.num_experts).repeat_interleave(counts)
        token = slots // routing.top_k
        rows = torch.sin(tokens[token] + expert.unsqueeze(1)) * gates.flatten()[slots].unsqueeze(1)
        return torch.zeros_like(tokens).index_add(0, token, rows)


def _tokens(hidden_size: int) -> Tensor:
    """Two sequences; the tokens of the second are all but equal, so that a limit on an expert's tokens would show."""
    x = torch.randn(2, _TOKENS // 2, hidden_size)
    x[1] = x[1, :1] + 0.01 * x[1]
    return x


def _bare(block: nn.Module, experts: str, shared: str | None) -> nn.Module:
    """A copy for trial runs whose experts are stand-ins."""
    bare = shallow_copy(block)
    bare._modules[experts] = container = shallow_copy(block._modules[experts])
    for index, key in enumerate(container._modules):
        container._modules[key] = _StandIn(index)
    if shared is not None:
        bare._modules[shared] = _StandIn(-1)
    return trial_copy(bare)


def _find_rule(block: nn.Module, experts: str, hidden_size: int) -> _Rule:
    count = len(block._modules[experts])
    reason = "there is no router that fits among its submodules"
    for rule in _rules(block, experts, hidden_size):

        def make_replacement(rule: _Rule = rule) -> nn.Module:
            new = recast(_bare(block, experts, rule.shared), _LoopBlock)
            new._rule = rule
            new._modules[experts] = _StandInExperts(count)
            return new

        try:
            compare(
                lambda rule=rule: _bare(block, experts, rule.shared),
                make_replacement,
                lambda module: module(_tokens(hidden_size)),
            )
            return rule
        except OtherOutputs as error:
            reason = str(error)
    raise CannotReplace(
        "expected one of the known rules around the experts (top-k of softmax or sigmoid, gates as they are or normalised, or "
        f"a router that returns ids and gates), got none that gives the block's outputs; the last try: {reason}"
    )


def _rules(block: nn.Module, experts: str, hidden_size: int) -> Iterator[_Rule]:
    """Rules to try: every submodule may be the router, and what is left the shared expert and its gate."""
    count = len(block._modules[experts])
    others = [
        name
        for name, child in block._modules.items()
        if name != experts and child is not None and next(child.parameters(), None) is not None
    ]
    for router in others:
        rest = [name for name in others if name != router]
        gate = next((name for name in rest if getattr(block._modules[name], "out_features", 0) == 1), None)
        shared = next((name for name in rest if name != gate), None)
        if len(rest) != (shared is not None) + (gate is not None) or (gate is not None and shared is None):
            continue
        for rule in _router_rules(block, _Rule(experts, router, shared=shared, shared_gate=gate), count, hidden_size):
            yield from (rule, rule._replace(logits_too=True)) if rule.choice is None else (rule,)


def _router_rules(block: nn.Module, rule: _Rule, count: int, hidden_size: int) -> Iterator[_Rule]:
    router = block._modules[rule.router]
    for flat in (True, False):
        with quiet():
            x = _tokens(hidden_size)
            try:
                outputs = trial_copy(router).eval()(x.flatten(0, 1) if flat else x)
            except Exception:  # a router that does not take such tokens, and so not the router
                continue
        if isinstance(outputs, Tensor):
            if flat and outputs.size(-1) == count:
                for top_k in _top_ks(block, router, count):
                    for scoring, normalize in itertools.product(("softmax", "sigmoid"), (True, False)):
                        yield rule._replace(top_k=top_k, scoring=scoring, normalize=normalize)
        elif isinstance(outputs, tuple | list):
            for ids, gates in itertools.permutations(range(len(outputs)), 2):
                a, b = outputs[ids], outputs[gates]
                fit = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dim() >= 2
                if fit and not a.is_floating_point() and b.is_floating_point():
                    yield rule._replace(choice=(ids, gates), flat=flat)


def _top_ks(block: nn.Module, router: nn.Module, count: int) -> list[int]:
    """Candidates for top_k: the numbers that the block and its router keep, then small ones."""
    kept = [value for module in (block, router) for value in module.__dict__.values() if type(value) is int]
    return list(dict.fromkeys(k for k in [*kept, *range(1, 9)] if 1 <= k <= count))
