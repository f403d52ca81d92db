"""How transformers learns of the implementation, and how a choice of it is checked at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, __version__
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..replace.interface import IMPLEMENTATION
from .experts import experts_forward
from .rules import check, experts_modules

__all__ = ["register"]

if tuple(int(number) for number in __version__.split(".")[:2]) < (5, 8):
    raise ImportError(f"transformers {__version__} has no experts interface that others can register with")


def register() -> None:
    """Make ``"scattermoe"`` an experts implementation of transformers, once per process.

    transformers asks an implementation for nothing but its forward pass, in the middle of a model's. Whether a model can be
    served is known where the implementation is chosen: the three methods of ``PreTrainedModel`` that do so are wrapped.
    """
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    PreTrainedModel.set_experts_implementation = _setting(PreTrainedModel.set_experts_implementation)
    PreTrainedModel.from_pretrained = _loading(PreTrainedModel.from_pretrained.__func__)
    PreTrainedModel._from_config = _creating(PreTrainedModel._from_config.__func__)


def _setting(set_implementation: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(set_implementation)
    def set_and_check(self: PreTrainedModel, experts_implementation: str | dict[str, str]) -> None:
        configs = _configs(self)
        before = [config._experts_implementation for config in configs]
        set_implementation(self, experts_implementation)
        if not _names_it(experts_implementation):
            return
        try:
            _check_chosen(self)
        except ValueError:
            for config, implementation in zip(configs, before, strict=True):
                config._experts_implementation_internal = implementation
            raise

    return set_and_check


def _loading(load: Callable[..., Any]) -> classmethod:
    @functools.wraps(load)
    def load_and_check(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # The auto classes hand the choice over in the config.
        if any(config._experts_implementation == IMPLEMENTATION for config in _configs(model)):
            _check_chosen(model)
        return loaded

    return classmethod(load_and_check)


def _creating(create: Callable[..., PreTrainedModel]) -> classmethod:
    @functools.wraps(create)
    def create_and_check(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> PreTrainedModel:
        # Not the choice in the config: a model of several hands it to its parts without experts as well.
        chosen = _names_it(kwargs.get("experts_implementation"))
        model = create(cls, *args, **kwargs)
        if chosen:
            _check_chosen(model)
        return model

    return classmethod(create_and_check)


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Those of the model and of the models inside: where the choice is kept."""
    return [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]


def _names_it(implementation: str | dict[str, str] | None) -> bool:
    return IMPLEMENTATION in (implementation.values() if isinstance(implementation, dict) else (implementation,))


def _check_chosen(model: PreTrainedModel) -> None:
    if next(experts_modules(model), None) is None:
        raise ValueError(
            f"{type(model).__name__} cannot run on scattermoe: none of its modules takes transformers' experts interface; "
            "scattermoe.replace_moe(model) swaps the blocks that it knows"
        )
    check(model)
