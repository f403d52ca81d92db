"""`replace_moe`: find the blocks, prepare what takes their place, and only then touch the model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import attention, experts, mlp, moe, parallel_experts
from ..functional import DTYPES
from .interface import broken_rule, is_switched, switch_experts, takes_interface
from .recast import become, is_recast
from .registry import BlockType, CannotReplace, find_block_type
from .report import Entry, ReplaceReport
from .stacked import StackedExperts
from .trial import check_replacement

__all__ = ["replace_moe"]

_OURS = (
    moe.MoE,
    attention.MixtureOfAttention,
    attention.AttentionExperts,
    experts.Experts,
    mlp.MLP,
    mlp.GLUMLP,
    parallel_experts.ParallelExperts,
)
_NO_TYPE = "expected a known block type: register_block adds one"
# What a mixture of experts that no block type matches is called.
_UNKNOWN = re.compile(r"(MoE|MOE|Moe|Experts|SparseMLP|(MoE|Moe)(Block|Layer))$")


def replace_moe(model: nn.Module, *, strict: bool = True) -> ReplaceReport:
    """Run a model's mixture-of-experts blocks, and mixtures of attention, on scattermoe: same weights, same numbers.

    Blocks are changed in place and keep their names, hooks, dtype, device, training mode and ``requires_grad``; the state dict
    keeps its keys and shapes, so that checkpoints load into the changed model and its checkpoints into the original. The
    parameters themselves stay, too, with one exception: experts that are modules of their own are stacked into one parameter
    for each layer. Make the optimiser after the call.

    It knows

    * transformers' models that take its experts interface, which are switched there (``set_experts_implementation``);
    * JetMoE's mixtures of experts and of attention, and other blocks of parallel experts with weights ``[E, out, in]``;
    * Llama 4's blocks, and DBRX's and Aria's experts;
    * experts with one ``gate_up_proj`` and ``down_proj`` for all, whatever router calls them;
    * blocks that loop over a ``ModuleList`` (or ``ModuleDict``) of experts, of two or three linear layers each, behind a router
      of their own: which rule they follow is found by trying;
    * ScatterMoE 0.3's modules in copies that a model brings along;
    * what :func:`scattermoe.register_block` adds.

    A block is run on random tokens before anything is changed, as a copy with random weights, and its replacement must give the
    same outputs; blocks that drop tokens, draw noise or do anything else that is not known are not replaced. The number of
    experts per token is part of what was found: changing ``block.top_k`` of a loop afterwards has no effect.

    Args:
        model: any module; changed in place.
        strict: raise unless every block can be replaced and there is one; False leaves what cannot be replaced and says why in
            the report.

    Returns:
        :class:`ReplaceReport`: ``print`` it.

    Raises:
        CannotReplace: a ``ValueError`` that names each block's path in the model and the rule it breaks, for ``strict=True``.
            The model is as it was.

    Example::

        >>> import torch
        >>> from torch import nn
        >>> import scattermoe
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate = nn.Linear(16, 4, bias=False)
        ...         self.experts = nn.ModuleList(
        ...             nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(4)
        ...         )
        ...     def forward(self, x):
        ...         gates, ids = self.gate(x).softmax(-1).topk(2)
        ...         y = torch.zeros_like(x)
        ...         for e, expert in enumerate(self.experts):
        ...             where = ids == e
        ...             y += (gates * where).sum(-1, keepdim=True) * expert(x)
        ...         return y
        >>> model = nn.Sequential(nn.LayerNorm(16), Block())
        >>> print(scattermoe.replace_moe(model))
        replaced 1: experts of a loop, stacked
          1 (Block)
        >>> list(model.state_dict())[3:5]
        ['1.experts.0.0.weight', '1.experts.0.0.bias']
    """
    plan = _Plan()
    plan.visit(model, "", set())
    plan.leave_shared(model)
    found = plan.swaps or plan.experts or plan.present
    if strict and (plan.left or not found):
        lines = [f"{entry}: {entry.note}" for entry in plan.left] or [
            "it has no mixture-of-experts block that is known"
        ]
        raise CannotReplace(
            f"cannot replace every mixture-of-experts block of {type(model).__name__}, and changed none:\n  "
            + "\n  ".join(lines)
        )
    with ExitStack() as undo:
        for swap in plan.swaps:
            undo.callback(_restorer(swap.block))
            become(swap.block, swap.replacement)
            for module in _stacked(swap.block):
                module.take_weights()
        if plan.experts:
            undo.callback(switch_experts(model, [module for module, _ in plan.experts]))
        undo.pop_all()
    replaced = [*(swap.entry for swap in plan.swaps), *(entry for _, entry in plan.experts)]
    return ReplaceReport(tuple(replaced), tuple(plan.present), tuple(plan.left))


def _restorer(block: nn.Module) -> Callable[[], None]:
    kind, attributes = type(block), block.__dict__
    hooks = {
        name: value.copy() for name, value in attributes.items() if name.endswith("_hooks") and isinstance(value, dict)
    }

    def restore() -> None:
        for name, value in hooks.items():
            attributes[name].clear()
            attributes[name].update(value)
        object.__setattr__(block, "__class__", kind)
        object.__setattr__(block, "__dict__", attributes)

    return restore


def _stacked(module: nn.Module) -> list[StackedExperts]:
    return [child for child in module.modules() if isinstance(child, StackedExperts)]


class _Swap(NamedTuple):
    block: nn.Module
    replacement: nn.Module
    entry: Entry


class _Plan:
    """What to do with a model; making it changes nothing."""

    def __init__(self) -> None:
        self.swaps: list[_Swap] = []
        self.experts: list[tuple[nn.Module, Entry]] = []
        self.present: list[Entry] = []
        self.left: list[Entry] = []

    def visit(self, module: nn.Module, path: str, seen: set[int]) -> None:
        """Look at a module and, unless it is a block, at its submodules."""
        if id(module) in seen:
            return
        seen.add(id(module))
        name = type(module).__name__
        if isinstance(module, _OURS) or is_recast(module):
            self.present.append(Entry(path, name, "nothing to do"))
        elif (kind := find_block_type(module)) is not None:
            try:
                self.swaps.append(_Swap(module, _replacement(module, kind), Entry(path, name, kind.name)))
            except CannotReplace as error:
                self.left.append(Entry(path, name, str(error)))
        elif takes_interface(module):
            if is_switched(module):
                self.present.append(Entry(path, name, "nothing to do"))
            elif (reason := broken_rule(module)) is not None:
                self.left.append(Entry(path, name, reason))
            else:
                self.experts.append((module, Entry(path, name, "transformers' experts interface")))
        else:
            known, left = self._count(), len(self.left)
            for child_name, child in module.named_children():
                self.visit(child, f"{path}.{child_name}".lstrip("."), seen)
            below = {entry.note for entry in self.left[left:]}
            if self._count() == known and below <= {_NO_TYPE} and _UNKNOWN.search(name):
                self.left[left:] = [Entry(path, name, _NO_TYPE)]

    def leave_shared(self, model: nn.Module) -> None:
        """Leave the blocks whose experts are somewhere else in the model, too: stacking would separate the two."""
        wrapped = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())
        for swap in list(self.swaps):
            for stacked in _stacked(swap.replacement):
                elsewhere = _elsewhere(model, swap.block, stacked.source[0])
                reason = f"expected experts of this block alone, which can be stacked, got them also as {elsewhere}"
                if wrapped:
                    reason = "expected a model that is wrapped in DistributedDataParallel afterwards"
                if wrapped or elsewhere is not None:
                    self.swaps.remove(swap)
                    self.left.append(dataclasses.replace(swap.entry, note=reason))
                    break

    def _count(self) -> int:
        return len(self.swaps) + len(self.experts) + len(self.present)


def _elsewhere(model: nn.Module, block: nn.Module, container: nn.Module) -> str | None:
    """Where in the model a container's modules or parameters are beside the container's place in its block."""
    modules = {id(module) for module in container.modules()}
    parameters = {id(parameter) for parameter in container.parameters()}
    name = next(name for name, child in block._modules.items() if child is container)
    named = list(model.named_modules(remove_duplicate=False))
    places = [f"{path}.{name}".lstrip(".") for path, module in named if module is block]
    for path, module in named:
        held = id(module) in modules or any(id(parameter) in parameters for parameter in module._parameters.values())
        if held and not any(path == place or path.startswith(f"{place}.") for place in places):
            return path
    return None


def _replacement(block: nn.Module, kind: BlockType) -> nn.Module:
    if "forward" in block.__dict__:
        raise CannotReplace("expected the forward of the block's class, got one that was set on this block alone")
    reason = _unfit_weights(block)
    if reason is not None:
        raise CannotReplace(reason)
    try:
        replacement = kind.convert(block)
        if kind.trial is not None:
            check_replacement(block, kind.convert, kind.trial)
    except CannotReplace:
        raise
    except Exception as error:
        raise CannotReplace(f"expected a conversion that works, got {error!r}") from error
    wanted, given = _layout(block), _layout(replacement)
    if wanted != given:
        names = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        raise CannotReplace(
            f"expected a replacement with the block's state dict, got another one: {', '.join(names[:5])}"
        )
    return replacement


def _unfit_weights(block: nn.Module) -> str | None:
    for name, parameter in block.named_parameters():
        if parameter.dtype not in DTYPES:
            return f"expected floating weights, got {parameter.dtype} as {name} (quantised)"
        if type(parameter) is not nn.Parameter:
            return f"expected plain parameters, got a {type(parameter).__name__} as {name} (quantised or sharded)"
        if type(parameter.data) is not torch.Tensor:
            return f"expected plain tensors, got a {type(parameter.data).__name__} as {name} (quantised or sharded)"
    return None


def _layout(module: nn.Module) -> dict[str, Any]:
    return {
        name: (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)
        for name, value in module.state_dict().items()
    }
