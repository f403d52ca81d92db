"""The block types that `replace_moe` knows, and how a user adds one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import nn

from .recast import recast

__all__ = ["BlockType", "CannotReplace", "check_bypassed", "find_block_type", "register_block"]

Matches = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool]
Conversion = TypeVar("Conversion", bound=Callable[[Any], nn.Module])  # a module class is such a callable, too


class CannotReplace(ValueError):
    """A block that cannot be replaced, and the rule that it breaks."""


class BlockType(NamedTuple):
    """One kind of block.

    Attributes:
        name: what the report calls the swap.
        matches: whether a module is such a block.
        convert: the module that takes a block's place; leaves the block as it is, raises :class:`CannotReplace`.
        trial: runs a block on inputs that it draws itself; None if blocks of this kind cannot be tried.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    convert: Callable[[Any], nn.Module]
    trial: Callable[[Any], Any] | None


_block_types: list[BlockType] = []


def register_block(
    matches: Matches, *, name: str | None = None, trial: Callable[[Any], Any] | None = None
) -> Callable[[Conversion], Conversion]:
    """Teach :func:`scattermoe.replace_moe` a block type; decorates the class or function that says what takes its place.

    The newest registration that matches a module is taken.

    Args:
        matches: a module class, several, or a function that tells whether a module is such a block.
        name: what reports call the swap; by default the decorated object's name.
        trial: runs a block on inputs that it draws itself and returns the outputs, ``lambda block: block(torch.randn(2, 8,
            block.width))``. With it every block is tried before the model is touched: a copy of the block with random
            float32 weights and its replacement must give the same outputs, in evaluation and in training mode.

    Returns:
        A decorator. On an ``nn.Module`` class it means: a block keeps its parameters, submodules, attributes and hooks, and
        this class's methods take over. On a function it means: the function makes a block's replacement and leaves the
        block as it is; the replacement's state dict must have the block's names, shapes and dtypes.

    Example::

        >>> import torch
        >>> from torch import nn
        >>> import scattermoe
        >>> class Dense(nn.Module):  # every expert sees every token
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.router, self.weight = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 8))
        ...     def forward(self, x):
        ...         gates, ids = self.router(x).softmax(-1).topk(2)
        ...         outputs = torch.einsum("eoi,ti->teo", self.weight, x)
        ...         return (gates[..., None] * outputs.gather(1, ids[..., None].expand(-1, -1, 8))).sum(1)
        >>> @scattermoe.register_block(Dense, trial=lambda block: block(torch.randn(9, 8)))
        ... class Routed(nn.Module):
        ...     def forward(self, x):
        ...         gates, ids = scattermoe.topk_gating(self.router(x), 2)
        ...         routing = scattermoe.route(ids, 4)
        ...         rows = scattermoe.parallel_linear(x, self.weight, routing, grouped_out=True)
        ...         return scattermoe.combine(rows, gates, routing)
        >>> print(scattermoe.replace_moe(nn.Sequential(Dense())))
        replaced 1: Routed
          0 (Dense)
    """

    def decorate(conversion: Conversion) -> Conversion:
        convert = conversion
        if isinstance(conversion, type):

            def convert(block: nn.Module) -> nn.Module:
                return recast(block, conversion)

        test = (lambda module: isinstance(module, matches)) if isinstance(matches, type | tuple) else matches
        _block_types.append(BlockType(name or conversion.__name__, test, convert, trial))
        return conversion

    return decorate


def check_bypassed(path: str, *modules: nn.Module) -> None:
    """Raise if there is something on modules that a replacement will no longer call: hooks, or a forward of their own.

    Args:
        path: what to call the modules in the message.
        *modules: these and their submodules.

    Raises:
        CannotReplace: hooks or an instance's own forward, as adapters and offloading set them.
    """
    for module in modules:
        for name, child in module.named_modules():
            hooked = any(value for key, value in child.__dict__.items() if key.endswith("_hooks"))
            if hooked or "forward" in child.__dict__:
                where = f"{path}.{name}".rstrip(".")
                raise CannotReplace(f"expected no hooks on {where} and no forward of its own: it will not be called")


def find_block_type(module: nn.Module) -> BlockType | None:
    """The newest registered type that matches the module, or None."""
    return next((kind for kind in reversed(_block_types) if kind.matches(module)), None)
