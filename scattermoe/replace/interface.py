"""Models of transformers that take its experts interface: one setting switches all their experts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from torch import nn

__all__ = ["IMPLEMENTATION", "broken_rule", "is_switched", "switch_experts", "takes_interface", "weight_names"]

IMPLEMENTATION = "scattermoe"  # what transformers calls this library


def takes_interface(module: nn.Module) -> bool:
    """Whether a module's forward is dispatched by transformers' experts interface."""
    options = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    return all(name in module.__dict__ for name in options) and hasattr(module.config, "_experts_implementation")


def weight_names(module: nn.Module) -> tuple[str, str]:
    """What such a module calls the weights of its two projections."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def broken_rule(module: nn.Module) -> str | None:
    """Why such a module cannot run on scattermoe, or None."""
    return _registered().broken_rule(module)


def _registered() -> ModuleType:
    # Registers the name when it is first imported. transformers is there, or nothing would take its interface.
    return importlib.import_module("scattermoe.transformers")


def is_switched(module: nn.Module) -> bool:
    """Whether such a module runs on scattermoe already."""
    return module.config._experts_implementation == IMPLEMENTATION


def switch_experts(model: nn.Module, experts: list[nn.Module]) -> Callable[[], None]:
    """Set the experts implementation of a model and of its submodels.

    Args:
        model: the model that holds the experts.
        experts: modules that take the interface.

    Returns:
        A function that sets it back.
    """
    _registered()
    configs = {id(module.config): module.config for module in experts}
    for module in model.modules():
        if hasattr(module, "set_experts_implementation"):
            configs[id(module.config)] = module.config
    before = [(config, config._experts_implementation) for config in configs.values()]

    def restore() -> None:
        for config, implementation in before:
            config._experts_implementation_internal = implementation

    try:
        for module in model.modules():
            inside = {id(child) for child in module.modules()} if hasattr(module, "set_experts_implementation") else ()
            if any(id(child) in inside and not is_switched(child) for child in experts):
                module.set_experts_implementation(IMPLEMENTATION)
        for module in experts:  # those of no model
            if not is_switched(module):
                module.config._experts_implementation = IMPLEMENTATION
    except BaseException:
        restore()
        raise
    return restore
