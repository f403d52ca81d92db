"""Adapters in a whole model: adding, saving, merging and removing them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..functional import DTYPES
from ..parallel_experts import is_bare
from ..replace.recast import become, recast
from .adapters import WITH_ADAPTERS, Adapter, Adapters, Projection, projections

__all__ = [
    "TARGETS",
    "AdaptedModule",
    "adapter_parameters",
    "adapter_state_dict",
    "add_adapters",
    "load_adapter_state_dict",
    "merge",
    "remove",
    "unmerge",
]

TARGETS = ("up", "down", "query", "output", "linear")


class AdaptedModule(NamedTuple):
    """One module that got adapters.

    Attributes:
        path: where it is in the model.
        targets: which of its linear maps have adapters.
        num_parameters: the adapters' parameters, all together.
    """

    path: str
    targets: tuple[str, ...]
    num_parameters: int


def add_adapters(
    model: nn.Module,
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Iterable[str] = TARGETS,
    *,
    modules: Iterable[str] | None = None,
    freeze: bool = True,
    dtype: torch.dtype | None = None,
) -> list[AdaptedModule]:
    """Add low-rank adapters to the experts of a model, and freeze everything else.

    An expert's weight becomes ``W + alpha / r * B @ A``. The sum is never formed: its products with the tokens are grouped
    products of rank r. Adapters start as zero, so the model computes what it did.

    Args:
        model: any module with layers of this library in it, or transformers' experts modules that run on
            :mod:`scattermoe.transformers`. It is changed in place: such a layer gets a child ``lora``, and the names of its
            own parameters stay. The layer keeps its place and its identity.
        r: rank.
        alpha: scale of the adapters, times ``r``.
        dropout: share of the elements of an adapter's input that it does not see in training.
        targets: which linear maps get adapters: ``"up"`` and ``"down"`` of expert MLPs, ``"query"`` and ``"output"`` of
            :class:`scattermoe.MixtureOfAttention`, ``"linear"`` of a :class:`scattermoe.ParallelExperts` by itself.
        modules: paths of the layers that get adapters; None for all that can.
        freeze: let no parameter of the model but the adapters' require a gradient.
        dtype: dtype of the adapters' parameters; None for that of the weights. float32 under a bfloat16 base keeps small
            steps; the products are bfloat16 ones all the same.

    Returns:
        What got adapters.

    Raises:
        ValueError: a number out of range, an unknown target, no layer to adapt, a path that is none, a layer that has
            adapters already or cannot run with them, weights that are quantised or sharded. The model is left as it was.
        TypeError: a layer of a class that computes in a way of its own.

    Example::

        >>> import torch
        >>> from scattermoe import MoE, lora
        >>> moe = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)
        >>> lora.add_adapters(moe, r=2)
        [AdaptedModule(path='experts', targets=('up', 'down'), num_parameters=1024)]
        >>> optimiser = torch.optim.AdamW(lora.adapter_parameters(moe), lr=1e-3)

    Source: LoRA, https://arxiv.org/abs/2106.09685.
    """
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    unknown = [target for target in wanted if target not in TARGETS]
    if unknown or not wanted:
        raise ValueError(f"expected targets out of {', '.join(TARGETS)}, got {unknown or wanted!r}")
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"expected r to be an integer >= 1, got {r!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"expected 0 <= dropout < 1, got {dropout}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"expected dtype to be one of {', '.join(map(str, DTYPES))}, got {dtype}")

    made: list[tuple[str, nn.Module, Adapters]] = []
    for path, module, maps in _layers(model, modules):
        chosen = {target: projection for target, projection in maps.items() if target in wanted}
        if not chosen:
            continue
        _check_layer(path, module, chosen)
        adapters = Adapters()
        for target, projection in chosen.items():
            weight = projection.weight
            sizes = (weight.size(0), weight.size(2), weight.size(1))
            adapters[target] = Adapter(
                *sizes, r, alpha, dropout, device=weight.device, dtype=weight.dtype if dtype is None else dtype
            )
        made.append((path, module, adapters.train(module.training)))
    if not made:
        raise ValueError(
            f"expected a layer with one of the targets {', '.join(wanted)} in {type(model).__name__}, found none; layers are "
            "Experts (in MoE), MLP, GLUMLP, ParallelExperts, the experts of MixtureOfAttention, and transformers' experts "
            'modules set to "scattermoe"'
        )

    if freeze:
        model.requires_grad_(False)
    for _, module, adapters in made:
        kind = _kind(module)
        if kind is None:
            module.register_forward_pre_hook(_needs_scattermoe)
        else:
            become(module, recast(module, WITH_ADAPTERS[kind]))
        module.add_module("lora", adapters)
    return [
        AdaptedModule(path, tuple(adapters), sum(p.numel() for p in adapters.parameters()))
        for path, _, adapters in made
    ]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Find the parameters of all adapters in a model, for an optimiser.

    Args:
        model: with adapters.

    Returns:
        The parameters, A before B.

    Raises:
        ValueError: the model has no adapters.

    Example::

        >>> from scattermoe import MoE, lora
        >>> moe = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)
        >>> adapted = lora.add_adapters(moe, r=2, targets=("up",))
        >>> [list(p.shape) for p in lora.adapter_parameters(moe)]
        [[4, 2, 16], [4, 64, 2]]
    """
    return [parameter for _, _, adapters in _adapted(model) for parameter in adapters.parameters()]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Collect the adapters of a model: what a fine-tuned model differs by from its base.

    Args:
        model: with adapters.

    Returns:
        The part of ``model.state_dict()`` that belongs to adapters, under the same names.

    Raises:
        ValueError: the model has no adapters.

    Example::

        >>> from scattermoe import MoE, lora
        >>> moe = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)
        >>> adapted = lora.add_adapters(moe, targets=("up",))
        >>> list(lora.adapter_state_dict(moe))
        ['experts.lora.up.A', 'experts.lora.up.B']
    """
    return {
        name: value
        for path, _, adapters in _adapted(model)
        for name, value in adapters.state_dict(prefix=_join(path, "lora.")).items()
    }


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Put saved adapters into a model that has adapters of the same ranks and targets.

    Args:
        model: with adapters, not merged. ``alpha`` is not saved: it is the one that :func:`add_adapters` was given.
        state_dict: from :func:`adapter_state_dict`; values may have another dtype or device.

    Raises:
        ValueError: a name that is missing or too many, another shape, or the adapters are merged. The model is left as it was.

    Example::

        >>> from scattermoe import MoE, lora
        >>> first, second = (MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2) for _ in range(2))
        >>> adapted = lora.add_adapters(first), lora.add_adapters(second)
        >>> lora.load_adapter_state_dict(second, lora.adapter_state_dict(first))
    """
    for path, _, adapters in _adapted(model):
        if adapters.merged:
            raise ValueError(f"{_join(path, 'lora')}: expected adapters that are not merged; call unmerge first")
    own = adapter_state_dict(model)
    missing, unexpected = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
    if missing or unexpected:
        raise ValueError(
            f"expected the names of the model's adapters; missing: {sorted(missing) or 'none'}, "
            f"unexpected: {sorted(unexpected) or 'none'}"
        )
    for name, value in own.items():
        if value.shape != state_dict[name].shape:
            raise ValueError(f"{name}: expected shape {list(value.shape)}, got {list(state_dict[name].shape)}")
    for name, value in own.items():
        value.copy_(state_dict[name])


@torch.no_grad()
def merge(model: nn.Module, *, keep_base: bool = True) -> None:
    """Add the adapters of a model to its weights, so that it computes at the base model's cost.

    Sums are formed in float32 at least and rounded once. Adapters that are merged already are left alone.

    Args:
        model: with adapters.
        keep_base: keep the weights as they were, in memory and not in the state dict, for :func:`unmerge`. A difference of
            rounded sums would not give them back.

    Raises:
        ValueError: the model has no adapters, two layers with adapters share a weight, or weights are sharded. The model is
            left as it was.

    Example::

        >>> import torch
        >>> from scattermoe import MoE, lora
        >>> moe = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)
        >>> adapted = lora.add_adapters(moe)
        >>> lora.merge(moe)
        >>> lora.remove(moe)  # what stays is a plain layer with the sums as its weights
    """
    waiting = [adapted for adapted in _adapted(model) if not adapted[2].merged]
    places: dict[int, str] = {}
    for path, module, adapters in waiting:
        for place, projection, _ in _weights(path, module, adapters):
            parameter = projection.parameter
            if isinstance(parameter, DTensor):
                raise ValueError(f"{place}: expected a whole weight, got a DTensor; merge before sharding")
            other = places.setdefault(id(parameter), place)
            if other != place:
                raise ValueError(f"{place}: expected a weight of its own, got that of {other}, which has adapters too")
    for path, module, adapters in waiting:
        for _, projection, target in _weights(path, module, adapters):
            parameter = projection.parameter
            base = parameter.data
            merged = adapters[target].added_to(projection.weight)
            parameter.data = merged.transpose(1, 2) if projection.transposed else merged
            if keep_base:
                adapters.register_buffer(_base_name(target), base, persistent=False)
        adapters.merged = True


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Take back :func:`merge`: the weights are bitwise those from before, and the adapters apart again.

    Args:
        model: with adapters. Those that are not merged are left alone.

    Raises:
        ValueError: the model has no adapters, or they were merged with ``keep_base=False``. The model is left as it was.

    Example::

        >>> import torch
        >>> from scattermoe import MoE, lora
        >>> moe = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)
        >>> adapted, before = lora.add_adapters(moe), moe.experts.down_proj.clone()
        >>> lora.merge(moe)
        >>> lora.unmerge(moe)
        >>> torch.equal(moe.experts.down_proj, before)
        True
    """
    merged = [adapted for adapted in _adapted(model) if adapted[2].merged]
    for path, module, adapters in merged:
        for place, _, target in _weights(path, module, adapters):
            if _base_name(target) not in adapters._buffers:
                raise ValueError(f"{place}: expected adapters merged with keep_base=True, got keep_base=False")
    for path, module, adapters in merged:
        for _, projection, target in _weights(path, module, adapters):
            projection.parameter.data = adapters._buffers.pop(_base_name(target))
        adapters.merged = False


def remove(model: nn.Module) -> None:
    """Take the adapters out of a model, whose layers become what they were before :func:`add_adapters`.

    Weights that adapters are merged into stay merged. What was frozen stays frozen.

    Args:
        model: with adapters.

    Raises:
        ValueError: the model has no adapters.

    Example::

        >>> from scattermoe import MoE, lora
        >>> moe = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)
        >>> adapted = lora.add_adapters(moe)
        >>> lora.remove(moe)
        >>> moe = moe.requires_grad_(True)
    """
    for _, module, _ in _adapted(model):
        del module.lora
        if _kind(module) is not None:
            module.__class__ = type(module)._recast_from[1]
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _needs_scattermoe:
                del module._forward_pre_hooks[key]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _base_name(target: str) -> str:
    return f"{target}_base"


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The class of this library that a layer is of; None for one of transformers."""
    return next((kind for kind in WITH_ADAPTERS if isinstance(module, kind)), None)


def _adapted(model: nn.Module) -> list[tuple[str, nn.Module, Adapters]]:
    """Path, module and adapters of every layer that has adapters."""
    found = [
        (path, module, module._modules["lora"])
        for path, module in model.named_modules()
        if isinstance(module._modules.get("lora"), Adapters)
    ]
    if not found:
        raise ValueError(
            f"expected a model with adapters, got a {type(model).__name__} without; call add_adapters first"
        )
    return found


def _weights(path: str, module: nn.Module, adapters: Adapters) -> Iterator[tuple[str, Projection, str]]:
    """The path of each adapted weight, where its module keeps it, and its target."""
    maps = projections(module)
    for target in adapters:
        yield _join(path, maps[target].prefix + maps[target].name), maps[target], target


def _layers(model: nn.Module, modules: Iterable[str] | None) -> Iterator[tuple[str, nn.Module, dict[str, Projection]]]:
    """Path, module and linear maps of every layer that can have adapters, in or under one of the paths."""
    layers: dict[str, tuple[nn.Module, dict[str, Projection]]] = {}
    inner: set[int] = set()
    for path, module in model.named_modules():
        maps = None if id(module) in inner else projections(module)
        if maps is not None:
            layers[path] = module, maps
            inner.update(id(projection.owner) for projection in maps.values())
    chosen = set(layers)
    if modules is not None:
        chosen = set()
        for place in (modules,) if isinstance(modules, str) else modules:
            under = {path for path in layers if not place or path == place or path.startswith(f"{place}.")}
            if not under:
                raise ValueError(
                    f"{place}: expected the path of a module with a layer that can have adapters, found none"
                )
            chosen |= under
    for path, (module, maps) in layers.items():
        if path in chosen:
            yield path, module, maps


def _check_layer(path: str, module: nn.Module, chosen: Mapping[str, Projection]) -> None:
    """Raise unless a layer can have adapters, and has none."""
    name = f"{path or 'the model'} ({type(module).__name__})"
    if "lora" in module._modules:
        raise ValueError(f"{name}: expected a layer without adapters, got one that has some; remove them first")
    kind = _kind(module)
    if kind is None:
        _check_interface(name, module)
    else:
        for method in ("forward", "queries"):
            if getattr(type(module), method, None) is not getattr(kind, method, None):
                raise TypeError(
                    f"{name}: expected a layer that computes as {kind.__name__}, got a class with a {method} of its own"
                )
        for projection in chosen.values():
            if projection.owner is not module and not is_bare(projection.owner):
                raise TypeError(
                    f"{name}: expected {projection.prefix[:-1]} to be a plain ParallelExperts without hooks, "
                    f"got a {type(projection.owner).__name__}"
                )
    for projection in chosen.values():
        place = _join(path, projection.prefix + projection.name)
        weight = projection.owner._parameters.get(projection.name)
        if weight is None:
            raise ValueError(f"{place}: expected a parameter, got none (is it parametrised?)")
        if isinstance(weight, DTensor):
            raise ValueError(f"{place}: expected a whole weight, got a DTensor; add adapters before sharding")
        if weight.dtype not in DTYPES or type(weight) is not nn.Parameter or weight.dim() != 3:
            raise ValueError(
                f"{place}: expected weights [experts, out, in] of float64, float32, bfloat16 or float16, "
                f"got {type(weight).__name__} {list(weight.shape)} of {weight.dtype}"
            )


def _check_interface(name: str, module: nn.Module) -> None:
    implementation = module.config._experts_implementation
    if implementation != "scattermoe":
        raise ValueError(
            f'{name}: expected the experts implementation "scattermoe", got {implementation!r}; import '
            'scattermoe.transformers and call model.set_experts_implementation("scattermoe") first'
        )
    from ..transformers import broken_rule  # needs transformers, which made this module

    broken = broken_rule(module)
    if broken is not None:
        raise ValueError(f"{name}: {broken}")


def _needs_scattermoe(module: nn.Module, args: Any) -> None:
    """Before a forward pass of transformers' experts: no other implementation knows of the adapters."""
    implementation = module.config._experts_implementation
    if implementation != "scattermoe":
        raise RuntimeError(
            f"{type(module).__name__} has adapters of scattermoe.lora, which the experts implementation "
            f'{implementation!r} would leave out; use "scattermoe", or merge and remove them'
        )
