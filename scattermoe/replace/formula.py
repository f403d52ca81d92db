"""What a single expert of a loop computes, found by trying, and whether it may be stacked with its siblings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from ..activations import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS, apply_activation, apply_glu
from .registry import CannotReplace, check_bypassed
from .stacked import ExpertLayout
from .trial import difference, quiet, trial_copy

__all__ = ["check_experts", "find_formula"]

_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)


def _linears(expert: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in expert.named_modules() if isinstance(module, nn.Linear)}


def check_experts(name: str, container: nn.Module) -> None:
    """What stacking needs: experts of one making, made of plain linear layers whose weights belong to them alone."""
    check_bypassed(name, container)
    experts = dict(container.named_children())
    first = next(iter(experts.values()))
    for key, expert in experts.items():
        where = f"{name}.{key}"
        linears = _linears(expert)
        for path, linear in linears.items():
            if type(linear) is not nn.Linear:
                raise CannotReplace(f"expected plain nn.Linear layers, got a {type(linear).__name__} as {where}.{path}")
        own = {f"{path}.{kind}" for path, linear in linears.items() for kind, _ in linear.named_parameters()}
        if len(linears) not in (2, 3) or own != {path for path, _ in expert.named_parameters()}:
            raise CannotReplace(f"expected two or three linear layers and no other parameters in {where}")
        if _shapes(expert) != _shapes(first):
            raise CannotReplace(f"expected experts of one shape, got a {where} that differs from the first")
        for path, parameter in expert.named_parameters():
            twin = first.get_parameter(path)
            for rule in ("dtype", "device", "requires_grad"):
                if getattr(parameter, rule) != getattr(twin, rule):
                    raise CannotReplace(
                        f"expected one {rule} for all experts, got {getattr(twin, rule)} and {getattr(parameter, rule)} "
                        f"as {where}.{path}"
                    )
    if len(list(container.parameters())) != len(list(first.parameters())) * len(experts):
        raise CannotReplace(
            f"expected weights of each expert's own in {name} and no others, got shared or further ones"
        )
    if len(container.state_dict()) != len(list(container.parameters())):
        raise CannotReplace(f"expected experts without buffers in {name}")
    if len({linear.bias is not None for linear in _linears(first).values()}) != 1:
        raise CannotReplace("expected a bias on all of an expert's layers or on none")


def _shapes(expert: nn.Module) -> dict[str, torch.Size]:
    return {path: parameter.shape for path, parameter in expert.named_parameters()}


def find_formula(name: str, container: nn.Module) -> tuple[ExpertLayout, str]:
    """Which layer is which, and the activation: those that give every expert's own output."""
    (first, *others) = container._modules.items()
    found = next(_formulas(first[1]), None)
    if found is None:
        raise CannotReplace(
            "expected experts down(act(gate(x)) * up(x)) or down(act(up(x))) with act one of silu, gelu, gelu_tanh and relu "
            "(relu2 and identity too without a gate), the same in training, got other outputs"
        )
    for key, expert in others:
        if not _surely_alike(expert, first[1]) and found not in _formulas(expert):
            raise CannotReplace(f"expected experts of one formula, got a {name}.{key} that differs from the first")
    _check_up(first[1], found[0])
    return found


def _surely_alike(expert: nn.Module, first: nn.Module) -> bool:
    """Whether two experts have the same submodules and options, so that a look at one is enough."""
    if repr(expert) != repr(first) or type(expert) is not type(first):
        return False
    for a, b in zip(expert.modules(), first.modules(), strict=True):
        for name, value in a.__dict__.items():
            other = b.__dict__.get(name)
            plain = isinstance(value, bool | int | float | str) and type(value) is type(other)
            if name not in _MODULE_ATTRIBUTES and value is not other and not (plain and value == other):
                return False
    return True


def _formulas(expert: nn.Module) -> Iterator[tuple[ExpertLayout, str]]:
    """The formulas that give an expert's outputs on random tokens and weights, in training mode, too."""
    expert = trial_copy(expert)
    linears = _linears(expert)
    for down, *up in itertools.permutations(linears):
        columns, hidden_size = linears[down].in_features, linears[down].out_features
        if any(linears[name].weight.shape != (columns, hidden_size) for name in up):
            continue
        with quiet():
            x = torch.randn(8, hidden_size)
            try:
                want = [expert.train(training)(x) for training in (False, True)]
            except RuntimeError:  # an expert of two layers fits the other way round, too
                continue
            z = [linears[name](x) for name in up]
            for activation in GATED_ACTIVATIONS if len(up) == 2 else PLAIN_ACTIVATIONS:
                h = apply_glu(*z, activation) if len(up) == 2 else apply_activation(*z, activation)
                if difference(want, [linears[down](h)] * 2) is None:
                    yield ExpertLayout(tuple(up), down), activation


def _check_up(expert: nn.Module, layout: ExpertLayout) -> None:
    gate, up = layout.up[0], layout.up[-1]
    for kind in dict(expert.get_submodule(up).named_parameters()):
        a, b = expert.get_parameter(f"{gate}.{kind}"), expert.get_parameter(f"{up}.{kind}")
        if a.requires_grad != b.requires_grad or a.dtype != b.dtype:
            raise CannotReplace(
                f"expected one requires_grad and one dtype for {gate}.{kind} and {up}.{kind}, which become one parameter"
            )
