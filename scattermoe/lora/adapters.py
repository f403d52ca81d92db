"""Adapters as modules, and the library's layers with adapters in them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import parallel_experts
from ..activations import activation_name
from ..attention import AttentionExperts
from ..experts import Experts
from ..functional import Routing, combine, route
from ..mlp import GLUMLP, MLP
from ..parallel_experts import ParallelExperts
from ..replace.interface import takes_interface, weight_names
from .functional import LowRank, moe_mlp, parallel_linear

__all__ = ["WITH_ADAPTERS", "Adapter", "Adapters", "Projection", "low_ranks", "projections"]


class Adapter(nn.Module):
    """A low-rank addend to the weights of E experts, ``alpha / r * B @ A``.

    Args:
        num_experts: E.
        in_features: columns of the experts' weights.
        out_features: rows of the experts' weights.
        r: rank.
        alpha: the addend is scaled by ``alpha / r``.
        dropout: share of the input's elements that A does not see in training.
        device: where to create the parameters.
        dtype: floating dtype of the parameters.

    Parameters: ``A`` ``[E, r, in_features]``, uniform as an ``nn.Linear``'s weight; ``B`` ``[E, out_features, r]``, zero, so
    that nothing changes at first.

    Example::

        >>> from scattermoe.lora import Adapter
        >>> sum(p.numel() for p in Adapter(4, 16, 32, r=2, alpha=4).parameters())
        384

    Source: LoRA, https://arxiv.org/abs/2106.09685.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.A = nn.Parameter(torch.empty(num_experts, r, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(num_experts, out_features, r, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A (Kaiming-uniform with the slope that ``nn.Linear`` uses) and zero B."""
        bound = self.A.size(2) ** -0.5
        nn.init.uniform_(self.A, -bound, bound)
        nn.init.zeros_(self.B)

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        sizes = f"num_experts={self.A.size(0)}, in_features={self.A.size(2)}, out_features={self.B.size(1)}"
        return f"{sizes}, r={self.r}, alpha={self.alpha}, dropout={self.dropout}"

    def low_rank(self) -> LowRank:
        """The addend as the functions of :mod:`scattermoe.lora` take it."""
        return LowRank(self.A, self.B, self.alpha / self.r, self.dropout if self.training else 0.0)

    @torch.no_grad()
    def added_to(self, weight: Tensor) -> Tensor:
        """The sum of weights and addend, computed in float32 at least, one expert at a time, and rounded once.

        Args:
            weight: ``[E, out_features, in_features]``, any strides.

        Returns:
            A new tensor with weight's dtype and strides.
        """
        compute = torch.promote_types(weight.dtype, torch.float32)
        merged = torch.empty_like(weight)
        for out, base, a, b in zip(merged, weight, self.A, self.B, strict=True):
            out.copy_(torch.addmm(base.to(compute), b.to(compute), a.to(compute), alpha=self.alpha / self.r))
        return merged


class Adapters(nn.ModuleDict):
    """The adapters of one module by target, which it holds as its child ``lora``.

    Attributes:
        merged: the addends are part of the weights now, so that the layer computes without them.
    """

    merged: bool = False


def low_ranks(adapters: Adapters | None, *targets: str) -> tuple[LowRank | None, ...]:
    """The addends of the targets; None for one without adapter, and for all when there are no adapters or they are merged."""
    if adapters is None or adapters.merged:
        return (None,) * len(targets)
    return tuple(adapters[target].low_rank() if target in adapters else None for target in targets)


class Projection(NamedTuple):
    """Where a module keeps the weights of one of its linear maps.

    Attributes:
        owner: the module whose attribute it is.
        name: the attribute's name; its value is ``[E, out, in]`` ...
        transposed: ... or ``[E, in, out]``.
        prefix: path of ``owner`` in the module, with a dot at its end.
    """

    owner: nn.Module
    name: str
    transposed: bool = False
    prefix: str = ""

    @property
    def parameter(self) -> Tensor:
        """The weights as they are stored."""
        return getattr(self.owner, self.name)

    @property
    def weight(self) -> Tensor:
        """``[E, out, in]``, a view where it is stored transposed."""
        return self.parameter.transpose(1, 2) if self.transposed else self.parameter


class LoraExperts(Experts):
    """:class:`scattermoe.Experts` with adapters."""

    def forward(self, x: Tensor, gates: Tensor, routing: Routing) -> Tensor:
        """As :meth:`Experts.forward`."""
        up, down = low_ranks(self.lora, "up", "down")
        return moe_mlp(
            x,
            getattr(self, self._up_name),
            self.down_proj,
            gates,
            routing,
            up=up,
            down=down,
            activation=self.activation,
            glu_layout=self.glu_layout,
            up_bias=getattr(self, f"{self._up_name}_bias"),
            down_bias=self.down_proj_bias,
            alpha=self.alpha,
            limit=self.limit,
            recompute=self.recompute,
        )


class LoraAttentionExperts(AttentionExperts):
    """The experts of :class:`scattermoe.MixtureOfAttention` with adapters."""

    def queries(self, x: Tensor, routing: Routing) -> Tensor:
        """As :meth:`AttentionExperts.queries`."""
        (low_rank,) = low_ranks(self.lora, "query")
        return parallel_linear(x, self.q_proj, routing, low_rank, bias=self.q_proj_bias)

    def forward(self, rows: Tensor, gates: Tensor, routing: Routing) -> Tensor:
        """As :meth:`AttentionExperts.forward`."""
        (low_rank,) = low_ranks(self.lora, "output")
        rows = parallel_linear(rows, self.o_proj, routing, low_rank, bias=self.o_proj_bias, grouped_out=True)
        return combine(rows, gates, routing)


class LoraParallelExperts(ParallelExperts):
    """:class:`scattermoe.ParallelExperts` with adapters."""

    def forward(
        self,
        inputs: Tensor,
        k: int,
        sorted_expert_idxs: Tensor,
        sorted_scattered_idxs: Tensor,
        expert_offsets: Tensor,
        gates: Tensor | None = None,
        grouped_in: bool = False,
        grouped_out: bool = False,
    ) -> Tensor:
        """As :meth:`ParallelExperts.forward`."""
        order = (sorted_expert_idxs, sorted_scattered_idxs, expert_offsets)
        y = super().forward(inputs, k, *order, gates=gates, grouped_in=grouped_in, grouped_out=grouped_out)
        (low_rank,) = low_ranks(self.lora, "linear")
        if low_rank is None:
            return y
        a, b = (t.to(y.dtype).permute(0, 2, 1) for t in (low_rank.A, low_rank.B))
        dropped = nn.functional.dropout(inputs, low_rank.dropout)
        middle = parallel_experts.parallel_linear(dropped, a, k, *order, grouped_in=grouped_in, grouped_out=True)
        return y + parallel_experts.parallel_linear(
            middle * low_rank.scale, b, 1, *order, gates=gates, grouped_in=True, grouped_out=grouped_out
        )


class _LoraExpertMLP:
    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        """As without adapters, and an activation that is not a known one is called between the two layers as well."""
        if self.activation is None:
            raise TypeError("expected activation to be a callable, got None: pass one to the constructor")
        tokens = x.reshape(-1, x.size(-1))
        gates = self._per_token("expert_p", expert_p, tokens)
        expert_ids = self._per_token("expert_idxs", expert_idxs, tokens)
        up, down = low_ranks(self.lora, "up", "down")
        y = moe_mlp(
            tokens,
            self.experts.weight,
            self.output_experts.weight,
            gates,
            route(expert_ids, self.num_experts),
            up=up,
            down=down,
            activation=activation_name(self.activation, gated=self._gated) or self._activate,
            glu_layout="up_gate",
            up_bias=self.experts.bias,
            down_bias=self.output_experts.bias,
        )
        return y.reshape((*x.shape[:-1], y.size(-1)))


class LoraMLP(_LoraExpertMLP, MLP):
    """:class:`scattermoe.MLP` with adapters."""


class LoraGLUMLP(_LoraExpertMLP, GLUMLP):
    """:class:`scattermoe.GLUMLP` with adapters."""


# What a layer of a class becomes when it gets adapters. Its parameters stay, and so do their names.
WITH_ADAPTERS: dict[type[nn.Module], type[nn.Module]] = {
    Experts: LoraExperts,
    AttentionExperts: LoraAttentionExperts,
    ParallelExperts: LoraParallelExperts,
    MLP: LoraMLP,
    GLUMLP: LoraGLUMLP,
}


def projections(module: nn.Module) -> dict[str, Projection] | None:
    """The linear maps of a module that can have adapters, by target.

    Args:
        module: any module.

    Returns:
        ``{"up": ..., "down": ...}``, ``{"query": ..., "output": ...}`` or ``{"linear": ...}``; None for a module that is no
        such layer by itself.
    """
    if isinstance(module, (MLP, GLUMLP)):
        return {
            "up": Projection(module.experts, "weight", prefix="experts."),
            "down": Projection(module.output_experts, "weight", prefix="output_experts."),
        }
    if isinstance(module, Experts):
        return {"up": Projection(module, module._up_name), "down": Projection(module, "down_proj")}
    if isinstance(module, AttentionExperts):
        return {"query": Projection(module, "q_proj"), "output": Projection(module, "o_proj")}
    if isinstance(module, ParallelExperts):
        return {"linear": Projection(module, "weight")}
    if takes_interface(module):
        up, down = weight_names(module)
        transposed = module.is_transposed
        return {"up": Projection(module, up, transposed), "down": Projection(module, down, transposed)}
    return None
