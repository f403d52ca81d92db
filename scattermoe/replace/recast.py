"""Modules that change class and keep everything else."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

__all__ = ["become", "is_recast", "recast", "shallow_copy"]


def recast(block: nn.Module, methods: type[nn.Module]) -> nn.Module:
    """A module with a block's parameters, buffers, submodules, attributes and hooks, and with other methods.

    Its class derives from ``methods`` and from the block's class, so that ``isinstance`` tests and methods that are not
    overridden work as before. Submodules can be exchanged in it without touching the block.

    Args:
        block: the module; stays as it is.
        methods: the class whose methods come first. Its ``__init__`` is not called.

    Returns:
        The new module, sharing the block's tensors and hooks.
    """
    return _share(block, _restore(methods, type(block)))


def shallow_copy(block: nn.Module) -> nn.Module:
    """A module of the same class that shares the block's tensors and hooks; its submodules can be exchanged."""
    return _share(block, type(block).__new__(type(block)))


def _share(block: nn.Module, new: nn.Module) -> nn.Module:
    new.__dict__.update(block.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        new.__dict__[name] = block.__dict__[name].copy()
    return new


def is_recast(module: nn.Module) -> bool:
    """Whether the module's class was made by :func:`recast`."""
    return hasattr(type(module), "_recast_from")


def become(block: nn.Module, replacement: nn.Module) -> None:
    """Turn a module into another one in place: whoever holds the block now holds the replacement.

    Training mode and hooks of the block carry over.
    """
    if replacement.training != block.training:
        replacement.train(block.training)
    for name, hooks in block.__dict__.items():
        added = replacement.__dict__.get(name)
        if name.endswith("_hooks") and added is not hooks and isinstance(hooks, dict):
            hooks.update(added or {})  # the block's own dict, because handles that remove hooks hold on to it
            replacement.__dict__[name] = hooks
    object.__setattr__(block, "__class__", type(replacement))
    object.__setattr__(block, "__dict__", replacement.__dict__)


@functools.cache
def _recast_class(methods: type, original: type) -> type:
    bases = (methods,) if issubclass(methods, original) else (methods, original)
    namespace = {"__module__": methods.__module__, "__reduce_ex__": _reduce, "_recast_from": (methods, original)}
    return type(f"ScatterMoE{original.__name__}", bases, namespace)


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    # Pickle and deepcopy find a class by its name, and this one has none: they are told its parts instead.
    kind = next(kind for kind in type(self).__mro__ if "_recast_from" in kind.__dict__)
    return (_restore, kind._recast_from, *super(kind, self).__reduce_ex__(protocol)[2:])


def _restore(methods: type, original: type) -> nn.Module:
    kind = _recast_class(methods, original)
    return kind.__new__(kind)
