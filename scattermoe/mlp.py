"""ScatterMoE 0.3's expert MLPs: the caller brings the router, the module holds the experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import functional
from .activations import activation_name
from .parallel_experts import ParallelExperts, flatten_sort_count, is_bare

__all__ = ["GLUMLP", "MLP"]


class _ExpertMLP(nn.Module):
    """What MLP and GLUMLP share: two layers of experts, and the choice between the fused and the composed path."""

    _gated: bool

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        bias: bool,
        activation: Callable[[Tensor], Tensor] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if top_k < 1:
            raise ValueError(f"expected top_k >= 1, got {top_k}")
        self.num_experts = num_experts
        self.input_size = input_size
        self.hidden_size = hidden_size
        up_size = 2 * hidden_size if self._gated else hidden_size
        self.experts = ParallelExperts(num_experts, input_size, up_size, bias=bias, device=device, dtype=dtype)
        self.output_experts = ParallelExperts(
            num_experts, hidden_size, input_size, bias=bias, device=device, dtype=dtype
        )
        self.top_k = min(top_k, num_experts)
        self.activation = activation

    def extra_repr(self) -> str:
        """Experts per token, for ``print(module)``."""
        return f"k={self.top_k}"

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        """Send every token through its experts and add up what they return.

        Args:
            x: tokens ``[..., input_size]``.
            expert_p: the gates, ``[T, top_k]`` (or x's leading dimensions and ``top_k``), a floating dtype.
            expert_idxs: the experts, shaped like ``expert_p``, an integer dtype.

        Returns:
            ``[..., input_size]`` in x's dtype.

        Raises:
            ValueError: ``expert_p`` or ``expert_idxs`` has not ``top_k`` elements per token.
            TypeError: no activation was given.
        """
        if self.activation is None:
            raise TypeError("expected activation to be a callable, got None: pass one to the constructor")
        tokens = x.reshape(-1, x.size(-1))
        gates = self._per_token("expert_p", expert_p, tokens)
        expert_ids = self._per_token("expert_idxs", expert_idxs, tokens)
        name = activation_name(self.activation, gated=self._gated)
        if name is not None and is_bare(self.experts) and is_bare(self.output_experts):
            y = functional.moe_mlp(
                tokens,
                self.experts.weight,
                self.output_experts.weight,
                gates,
                functional.route(expert_ids, self.num_experts),
                activation=name,
                glu_layout="up_gate",
                up_bias=self.experts.bias,
                down_bias=self.output_experts.bias,
            )
        else:
            order = flatten_sort_count(expert_ids, self.num_experts)
            h = self._activate(self.experts(tokens, self.top_k, *order, grouped_out=True))
            y = self.output_experts(h, 1, *order, gates=gates, grouped_in=True)
        return y.reshape((*x.shape[:-1], y.size(-1)))

    def _per_token(self, name: str, value: Tensor, tokens: Tensor) -> Tensor:
        if value.numel() != tokens.size(0) * self.top_k:
            raise ValueError(
                f"expected {name} of shape [{tokens.size(0)}, {self.top_k}] (tokens, top_k), got {list(value.shape)}"
            )
        return value.reshape(tokens.size(0), self.top_k)

    def _activate(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class MLP(_ExpertMLP):
    """Experts of two linear layers with any activation between, as ScatterMoE 0.3's ``MLP``.

    ``nn.SiLU()``, ``nn.GELU()`` (both kinds), ``nn.ReLU()``, ``nn.Identity()`` and their functions run as one fused
    operator that saves only its input and the pre-activations; any other callable runs between two scattered layers.

    Args:
        input_size: width of the tokens.
        hidden_size: width of each expert.
        num_experts: E.
        top_k: experts per token; clamped to ``num_experts``.
        bias: give both layers of every expert a bias.
        activation: a callable of one tensor.
        device: where to create the parameters.
        dtype: floating dtype of the parameters.

    Parameters: ``experts.weight`` ``[E, hidden_size, input_size]``, ``output_experts.weight``
    ``[E, input_size, hidden_size]`` and, with ``bias``, ``experts.bias`` and ``output_experts.bias``.

    Raises:
        ValueError: ``num_experts`` or ``top_k`` is below 1.

    Example::

        >>> import torch
        >>> from torch import nn
        >>> from scattermoe import MLP
        >>> mlp = MLP(input_size=16, hidden_size=32, num_experts=4, top_k=2, activation=nn.GELU())
        >>> gates, experts = torch.rand(5, 4).softmax(-1).topk(2)
        >>> mlp(torch.randn(5, 16), gates, experts).shape
        torch.Size([5, 16])

    Source: Scattered Mixture-of-Experts, https://arxiv.org/abs/2403.08245.
    """

    _gated = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, num_experts, top_k, bias, activation, device, dtype)

    def _activate(self, h: Tensor) -> Tensor:
        return self.activation(h)


class GLUMLP(_ExpertMLP):
    """Experts with a gated linear unit, as ScatterMoE 0.3's ``GLUMLP``: ``activation(gate) * up``.

    The rows of the first layer are ``[up; gate]``: the first ``hidden_size`` rows are the values, the others the gates.

    Args:
        input_size: width of the tokens.
        hidden_size: width of each expert.
        num_experts: E.
        top_k: experts per token; clamped to ``num_experts``.
        bias: give both layers of every expert a bias.
        activation: a callable of one tensor, applied to the gates. SiLU, GELU and ReLU run as one fused operator.
        device: where to create the parameters.
        dtype: floating dtype of the parameters.

    Parameters: ``experts.weight`` ``[E, 2 * hidden_size, input_size]``, ``output_experts.weight``
    ``[E, input_size, hidden_size]`` and, with ``bias``, ``experts.bias`` and ``output_experts.bias``.

    Raises:
        ValueError: ``num_experts`` or ``top_k`` is below 1.

    Example::

        >>> import torch
        >>> from scattermoe import GLUMLP
        >>> mlp = GLUMLP(input_size=16, hidden_size=32, num_experts=4, top_k=2)
        >>> gates, experts = torch.rand(5, 4).softmax(-1).topk(2)
        >>> mlp(torch.randn(5, 16), gates, experts).shape
        torch.Size([5, 16])

    Source: Scattered Mixture-of-Experts, https://arxiv.org/abs/2403.08245; GLU variants, https://arxiv.org/abs/2002.05202.
    """

    _gated = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] | None = nn.SiLU(),  # noqa: B008 (stateless; the default is part of the API)
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, num_experts, top_k, bias, activation, device, dtype)

    def _activate(self, h: Tensor) -> Tensor:
        up, gate = h.chunk(2, dim=-1)
        return self.activation(gate) * up
