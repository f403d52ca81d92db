"""What :class:`scattermoe.MoE` and :class:`scattermoe.MixtureOfAttention` share: a router, its losses and its load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .losses import BALANCES, MoEAux, router_aux
from .router import TopKRouter

__all__ = ["RoutedLayer"]


class RoutedLayer(nn.Module):
    """A layer whose experts are chosen by a router called ``gate``.

    Args:
        hidden_size: H, width of the tokens.
        num_experts: E.
        top_k: K, experts per token.
        aux_losses: compute the two losses of :class:`MoEAux`.
        balance: balance over the ``"batch"`` or within each ``"sequence"``.
        init_std: standard deviation of the initial weights.
        device: where to create the parameters.
        dtype: floating dtype of the parameters.
        **router_options: as for :class:`TopKRouter`.

    Raises:
        ValueError: an unknown name, or options that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        aux_losses: bool,
        balance: str,
        init_std: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **router_options: Any,
    ) -> None:
        super().__init__()
        if balance not in BALANCES:
            raise ValueError(f"expected balance to be one of {', '.join(BALANCES)}, got {balance!r}")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.aux_losses = aux_losses
        self.balance = balance
        self.init_std = init_std
        self.gate = TopKRouter(
            hidden_size, num_experts, top_k, init_std=init_std, device=device, dtype=dtype, **router_options
        )

    @property
    def router(self) -> TopKRouter:
        """The router, which the state dict calls ``gate`` as checkpoints do."""
        return self.gate

    def update_selection_bias(self, expert_load: Tensor, rate: float = 1e-3) -> None:
        """Move the router's selection bias one step towards balance; see :func:`scattermoe.router.update_selection_bias`.

        Args:
            expert_load: ``[E]`` slots per expert since the last step, summed over data-parallel ranks.
            rate: size of the step.

        Raises:
            RuntimeError: the layer was built without ``selection_bias=True``.
        """
        self.gate.update_selection_bias(expert_load, rate)

    def _aux(
        self,
        logits: Tensor,
        expert_ids: Tensor,
        expert_offsets: Tensor,
        leading: torch.Size,
        token_mask: Tensor | None,
        changed: bool = False,
    ) -> MoEAux:
        """What the layer returns beside its output, for logits ``[T, E]`` and ids ``[T, K]`` of tokens ``[*leading, H]``."""
        return router_aux(
            logits.reshape((*leading, self.num_experts)),
            expert_ids.reshape((*leading, expert_ids.size(1))),
            expert_offsets,
            scoring=self.gate.scoring,
            balance=self.balance,
            token_mask=token_mask,
            losses=self.aux_losses,
            changed=changed,
        )
