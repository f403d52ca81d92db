"""Trial runs: whether a replacement computes what its block computes, found out before the model is touched."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .registry import CannotReplace

__all__ = ["OtherOutputs", "check_replacement", "compare", "difference", "quiet", "trial_copy"]


class OtherOutputs(CannotReplace):
    """A replacement does not compute what its block does; another one may."""


TOLERANCE = 1e-4  # relative error of float32 outputs; another rule is off by far more on random weights


@torch.no_grad()
def trial_copy(block: nn.Module) -> nn.Module:
    """A copy on the CPU with random float32 weights and without hooks.

    Random weights, because zeros, a fresh bias or bfloat16 could hide a difference; and because the weights may be on the
    meta device. They overlap in memory: even a block of many gigabytes costs no more than its largest matrix.

    Args:
        block: stays as it is.

    Raises:
        CannotReplace: the block cannot be copied.
    """
    tensors = [*block.parameters(), *block.buffers()]
    pools = _pools(tensors)
    memo: dict[int, Any] = {}
    for index, tensor in enumerate(tensors):
        value = _random_like(tensor, pools, index)
        memo[id(tensor)] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
    try:
        twin = copy.deepcopy(block, memo)
    except Exception as error:
        raise CannotReplace(f"expected a block that can be copied for a trial run, got {error!r}") from error
    for module in twin.modules():
        for name, hooks in module.__dict__.items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                hooks.clear()
    return twin


def _fan_in(tensor: Tensor) -> int:
    return tensor.size(-1) if tensor.dim() > 1 else 4  # vectors are biases and such


def _pools(tensors: list[Tensor]) -> dict[int, Tensor]:
    """Random numbers for tensors of one width each, as many as the largest needs."""
    sizes: dict[int, int] = {}
    for index, tensor in enumerate(tensors):
        apart = tensor.shape[1:].numel() + 7 * tensor.size(0) if tensor.dim() == 3 else tensor.numel()
        size = 13 * index + apart
        sizes[_fan_in(tensor)] = max(size, sizes.get(_fan_in(tensor), 0))
    generator = torch.Generator().manual_seed(0)  # every copy of a block is the same
    return {width: torch.randn(size, generator=generator, device="cpu") * width**-0.5 for width, size in sizes.items()}


def _random_like(tensor: Tensor, pools: dict[int, Tensor], index: int) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.detach().cpu().clone()
    pool, offset, shape = pools[_fan_in(tensor)], 13 * index, tensor.shape
    if tensor.dim() == 3:
        return pool.as_strided(shape, (7, shape[2], 1), offset)  # the matrices of the experts lie a few numbers apart
    return pool[offset : offset + shape.numel()].view(shape)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Seeded random numbers on the CPU that leave the caller's alone; no gradients, no autocast, no default device."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        torch.manual_seed(0)
        yield


def check_replacement(
    block: nn.Module, convert: Callable[[nn.Module], nn.Module], run: Callable[[nn.Module], Any]
) -> None:
    """Check that a block and its replacement give the same outputs and leave the same traces, with random weights.

    Args:
        block: stays as it is.
        convert: makes a block's replacement.
        run: runs a block on inputs that it draws itself.

    Raises:
        CannotReplace: they differ, or one of them cannot run.
    """
    compare(lambda: trial_copy(block), lambda: convert(trial_copy(block)), run)


def compare(
    make_block: Callable[[], nn.Module], make_replacement: Callable[[], nn.Module], run: Callable[[nn.Module], Any]
) -> None:
    """Check that two modules give the same outputs and leave the same traces; see :func:`check_replacement`."""
    for training in (False, True):
        mode = "training" if training else "evaluation"
        block = make_block().train(training)
        try:
            want, traces = _observe(block, run)
        except Exception as error:
            raise CannotReplace(f"expected a block that runs on random tokens, got {error!r}") from error
        try:
            got, own_traces = _observe(make_replacement().train(training), run)
            unlike = difference(want, got)
        except Exception as error:
            unlike, own_traces = repr(error), traces
        if unlike is not None:
            kind = CannotReplace if training else OtherOutputs
            raise kind(f"expected the same outputs from its replacement in {mode} mode, got {unlike}")
        if traces - own_traces:
            names = ", ".join(sorted(traces - own_traces))
            raise CannotReplace(f"expected a forward that changes no attribute of the block, got one that sets {names}")


def _observe(module: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[Any, set[str]]:
    """Outputs of a run, and the names of the attributes and buffers that it changed."""
    before = _attributes(module)
    with quiet():
        outputs = run(module)
    after = _attributes(module)
    return outputs, {
        name
        for name, (value, version) in after.items()
        if name not in before or before[name][0] is not value or before[name][1] != version
    }


def _attributes(module: nn.Module) -> dict[str, tuple[Any, int]]:
    found = {}
    for path, child in module.named_modules():
        for name, value in [*child.__dict__.items(), *child._buffers.items()]:
            version = value._version if isinstance(value, Tensor) else 0
            found[f"{path}.{name}".lstrip(".")] = (value, version)
    return found


def difference(want: Any, got: Any) -> str | None:
    """How the outputs of two runs differ, or None."""
    wanted, structure = tree_flatten(want)
    given, other_structure = tree_flatten(got)
    if structure != other_structure:
        return f"{other_structure} instead of {structure}"
    for a, b in zip(wanted, given, strict=True):
        if not isinstance(a, Tensor):
            if a != b:
                return f"{b!r} instead of {a!r}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"{b.dtype} {list(b.shape)} instead of {a.dtype} {list(a.shape)}"
        else:
            error = ((b - a).double().norm() / a.double().norm().clamp(min=1e-30)).item()
            if not error <= TOLERANCE:
                return f"a relative difference of {error:.2g}"
    return None
