"""Experts whose weights are stacked in memory and apart in the state dict."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..experts import Experts

__all__ = ["ExpertLayout", "StackedExperts"]


class ExpertLayout(NamedTuple):
    """Where an expert keeps its layers.

    Attributes:
        up: names of the layers that make the up-projection's rows, the gate's before the others'.
        down: name of the layer that returns to the hidden size.
    """

    up: tuple[str, ...]
    down: str


class StackedExperts(Experts):
    """:class:`scattermoe.Experts` with the state dict of a container of single experts.

    Args:
        container: the experts; they stay as they are until :meth:`take_weights`.
        layout: where an expert keeps its layers.
        activation: as for :class:`scattermoe.Experts`.
    """

    def __init__(self, container: nn.Module, layout: ExpertLayout, activation: str) -> None:
        self._keys = list(container._modules)
        self._order = list(container.state_dict())
        self._layout = layout
        first = container._modules[self._keys[0]]
        down = first.get_submodule(layout.down)
        options = {
            "activation": activation,
            "bias": down.bias is not None,
            "device": "meta",
            "dtype": down.weight.dtype,
        }
        super().__init__(len(self._keys), down.out_features, down.in_features, **options)
        self.train(container.training)
        self.source: list[nn.Module] = [container]  # in a list, so that it is no submodule
        for name, parameter in self.named_parameters(recurse=False):
            parameter.requires_grad_(next(self._pieces(name))[1].requires_grad)

    def _pieces(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Each part of a stacked parameter, on the way to be copied, with the expert's own parameter."""
        for key, part in self._parts(name, getattr(self, name)):
            yield part, self.source[0].get_parameter(key)

    def _parts(self, name: str, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names in the state dict, and views of the stacked parameter that belong there."""
        layers = (self._layout.down,) if name.startswith("down") else self._layout.up
        kind = "bias" if name.endswith("bias") else "weight"
        for key, matrix in zip(self._keys, stacked, strict=True):
            for layer, part in zip(layers, matrix.chunk(len(layers)), strict=True):
                yield f"{key}.{layer}.{kind}", part

    @torch.no_grad()
    def take_weights(self) -> None:
        """Move the experts' weights and gradients here: afterwards their own parameters are views of the stacked ones."""
        for name, parameter in list(self.named_parameters(recurse=False)):
            device = next(self._pieces(name))[1].device
            stacked = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
            setattr(self, name, stacked)
            for part, own in self._pieces(name):
                part.copy_(own)
                own.data = part.data
            if any(own.grad is not None for _, own in self._pieces(name)):
                stacked.grad = torch.zeros_like(stacked)
                for (_, part), (_, own) in zip(self._parts(name, stacked.grad), self._pieces(name), strict=True):
                    if own.grad is not None:
                        part.copy_(own.grad)
        del self.source

    def __getattr__(self, name: str) -> Any:
        """The pieces by their names in the state dict, for tools that walk a key (``torch.distributed.checkpoint``)."""
        if name not in self.__dict__.get("_keys", ()):
            return super().__getattr__(name)
        found = SimpleNamespace()
        for stacked, parameter in self.named_parameters(recurse=False):
            for key, part in self._parts(stacked, parameter):
                owner, *path, last = key.split(".")
                if owner == name:
                    at = found
                    for step in path:
                        at = at.__dict__.setdefault(step, SimpleNamespace())
                    setattr(at, last, part)
        return found

    def _is_sharded(self) -> bool:
        # The pieces of a tensor that is spread over processes are no tensors of one process.
        return any(isinstance(parameter, DTensor) for parameter in self.parameters(recurse=False))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._is_sharded():
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        parts: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters(recurse=False):
            parts.update(self._parts(name, parameter if keep_vars else parameter.detach()))
        destination.update((prefix + key, parts[key]) for key in self._order)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stacked_names = {prefix + name for name, _ in self.named_parameters(recurse=False)}
        if self._is_sharded() or stacked_names <= state_dict.keys():
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        for name, parameter in self.named_parameters(recurse=False):
            parts = {}
            for key, part in self._parts(name, parameter.detach()):
                given = state_dict.pop(prefix + key, None)
                if given is None:
                    missing_keys.append(prefix + key)
                elif given.shape != part.shape:
                    error_msgs.append(
                        f"size mismatch for {prefix + key}: expected {list(part.shape)}, got {list(given.shape)}"
                    )
                else:
                    part = given
                parts[key] = part
            devices = {part.device for part in parts.values()}
            if len(devices) > 1 and parameter.is_meta:
                continue  # a part of it cannot be loaded
            rows = [part.to(parameter.device) for part in parts.values()] if len(devices) > 1 else list(parts.values())
            state_dict[prefix + name] = torch.cat(rows).view(parameter.shape)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [key for key in missing_keys if key not in stacked_names]
