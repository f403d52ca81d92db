"""How evenly the experts are used: counts, statistics of them, and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LoadStatistics", "expert_load", "load_statistics", "plot_expert_load"]


def expert_load(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Count the slots of each expert, on the device and without a host sync.

    Where there is a :class:`Routing` already, its ``expert_counts`` are these numbers.

    Args:
        expert_ids: any shape, any integer dtype; ids outside ``[0, E)`` are not counted.
        num_experts: E.

    Returns:
        int32 ``[E]``.

    Raises:
        TypeError: ``expert_ids`` is not of an integer dtype.
        ValueError: ``num_experts`` is below 1.

    Example::

        >>> import torch
        >>> from scattermoe import expert_load
        >>> expert_load(torch.tensor([[0, 2], [2, -1]]), num_experts=4)
        tensor([1, 0, 2, 0], dtype=torch.int32)
    """
    check_integer(expert_ids)
    if num_experts < 1:
        raise ValueError(f"expected num_experts >= 1, got {num_experts}")
    return count_ids(expert_ids.reshape(1, -1), num_experts).squeeze(0)


def check_integer(expert_ids: Tensor) -> None:
    """Raise TypeError for ids that are none."""
    if expert_ids.is_floating_point() or expert_ids.is_complex() or expert_ids.dtype == torch.bool:
        raise TypeError(f"expected expert_ids of an integer dtype, got {expert_ids.dtype}")


def count_ids(ids: Tensor, num_experts: int) -> Tensor:
    """Count each row of ids ``[B, N]`` into int32 ``[B, E]``; ids outside ``[0, E)`` fall off the end."""
    ids = ids.long()
    ids = ids.where((ids >= 0) & (ids < num_experts), num_experts)
    counts = torch.zeros(ids.size(0), num_experts + 1, dtype=torch.int32, device=ids.device)
    return counts.scatter_add(1, ids, torch.ones_like(ids, dtype=torch.int32))[:, :num_experts]


class LoadStatistics(NamedTuple):
    """How even a load is. Every field has the load's leading dimensions, is floating but for ``idle``, and is on its device.

    Attributes:
        imbalance: the largest load over the mean: 1 when even, E when one expert has it all. The slowest expert, or the
            rank that holds it, takes that many times as long as it would if the load were even.
        variation: the coefficient of variation, standard deviation over mean: 0 when even.
        entropy: of the shares of the load, in nats: ``log(E)`` when even, 0 when one expert has it all.
        effective: ``exp(entropy)``, the number of evenly used experts that have the same entropy.
        idle: int64, the experts without a slot ("dead" ones if they stay so).
    """

    imbalance: Tensor
    variation: Tensor
    entropy: Tensor
    effective: Tensor
    idle: Tensor


@torch.no_grad()
def load_statistics(load: Tensor) -> LoadStatistics:
    """Say how even a load is. A load of zero everywhere is even, with all experts idle.

    Args:
        load: ``[..., E]`` slots per expert, any dtype: ``aux.expert_load``, ``routing.expert_counts``, or those of several
            layers stacked.

    Returns:
        :class:`LoadStatistics`, float32 (float64 for float64 loads), of shape ``[...]``.

    Raises:
        ValueError: ``load`` has no dimension of experts.

    Example::

        >>> import torch
        >>> from scattermoe import load_statistics
        >>> statistics = load_statistics(torch.tensor([6, 2, 0, 0]))
        >>> statistics.imbalance, statistics.idle
        (tensor(3.), tensor(2))

    Source: the coefficient of variation as a measure of balance, https://arxiv.org/abs/1701.06538.
    """
    if load.dim() < 1 or load.size(-1) < 1:
        raise ValueError(f"expected load of shape [..., experts] with at least one expert, got {list(load.shape)}")
    num_experts = load.size(-1)
    shares = load.to(torch.promote_types(load.dtype, torch.float32))
    total = shares.sum(-1, keepdim=True)
    shares = torch.where(total == 0, 1 / num_experts, shares / total)
    entropy = torch.special.entr(shares).sum(-1)
    return LoadStatistics(
        imbalance=shares.amax(-1) * num_experts,
        variation=shares.std(-1, correction=0) * num_experts,
        entropy=entropy,
        effective=entropy.exp(),
        idle=(load == 0).sum(-1),
    )


def plot_expert_load(
    load: Tensor | Mapping[str, Tensor], *, title: str | None = None, labels: list[str] | None = None
) -> Figure:
    """Draw a heat map of layers by experts: white is an even share, red too much, blue too little, a cross nothing at all.

    Needs matplotlib, which nothing else in the library does. The only function here that waits for the device.

    Args:
        load: ``[L, E]`` (or ``[E]``) slots per expert in each layer, any dtype; or several of them by name, one panel each,
            for layers that differ in E.
        title: of the figure.
        labels: of the rows; their numbers from 1 by default.

    Returns:
        A ``matplotlib.figure.Figure`` that belongs to no window: ``figure.savefig(path)`` writes it.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: a load is not ``[L, E]``, there is none, or ``labels`` are of another number than the layers.

    Example::

        >>> import os, torch
        >>> from scattermoe import plot_expert_load
        >>> figure = plot_expert_load(torch.tensor([[4, 4, 4, 4], [9, 5, 2, 0]]), title="two layers")
        >>> figure.savefig(os.devnull, format="png")
    """
    panels = dict(load) if isinstance(load, Mapping) else {"": load}
    if not panels:
        raise ValueError("expected load to have at least one entry, got none")
    relative = {}
    for name, value in panels.items():
        if value.dim() not in (1, 2) or value.numel() == 0:
            raise ValueError(f"expected load of shape [layers, experts], got {list(value.shape)} of {name!r}")
        value = value.detach().to("cpu", torch.float64).reshape(-1, value.size(-1))
        if labels is not None and len(labels) != value.size(0):
            raise ValueError(f"expected as many labels as layers, got {len(labels)} and {value.size(0)}")
        relative[name] = value / value.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)

    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = max(value.size(0) for value in relative.values())
    figure = Figure(figsize=(1.5 + 4.5 * len(relative), 1.6 + 0.3 * layers), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(relative), squeeze=False)[0]
    # One scale for all panels, so that colours can be compared.
    colors = TwoSlopeNorm(1.0, 0.0, max(2.0, *(float(value.max()) for value in relative.values())))
    for panel, (name, value) in zip(axes, relative.items(), strict=True):
        image = panel.imshow(value.numpy(), cmap="RdBu_r", norm=colors, aspect="auto", interpolation="nearest")
        rows, columns = (value == 0).nonzero().T.tolist()
        panel.plot(columns, rows, "x", color="black", markersize=4)
        panel.set_yticks(range(value.size(0)), labels or [str(layer + 1) for layer in range(value.size(0))])
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set(title=name, xlabel="expert", ylabel="layer")
    figure.colorbar(image, ax=list(axes), label="load / even share")
    if title is not None:
        figure.suptitle(title)
    return figure
