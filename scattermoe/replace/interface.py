"""Models of transformers that take its experts interface: one setting switches all their experts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from torch import nn

__all__ = ["broken_rule", "is_switched", "switch_experts", "takes_interface"]

IMPLEMENTATION = "scattermoe"


def takes_interface(module: nn.Module) -> bool:
    """Whether a module's forward is dispatched by transformers' experts interface."""
    options = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    return all(name in module.__dict__ for name in options) and hasattr(module.config, "_experts_implementation")


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
    importlib.import_module(
        "scattermoe.transformers"
    )  # registers the name; transformers is loaded, or there were no such experts
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
