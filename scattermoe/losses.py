"""What a training loop wants to know of a router: balance, size of the logits, load of the experts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MoEAux", "load_balancing_loss", "router_aux", "router_z_loss"]

BALANCES = ("batch", "sequence")


class MoEAux(NamedTuple):
    """What a layer with a router returns beside its output. Nothing in it needs a device synchronisation.

    Reentrant activation checkpointing sees no tensors inside other values: under it, return the losses by themselves.

    Attributes:
        load_balancing_loss: scalar float32, differentiable; ``top_k`` at perfect balance. None if the layer was built
            with ``aux_losses=False``.
        z_loss: scalar float32, differentiable; None with ``aux_losses=False``.
        expert_load: ``[E]`` int32, slots each expert received in this call. Masked tokens are not counted.
        router_logits: ``[..., E]`` with the input's leading dimensions, differentiable.
    """

    load_balancing_loss: Tensor | None
    z_loss: Tensor | None
    expert_load: Tensor
    router_logits: Tensor


def router_z_loss(router_logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """The mean of ``logsumexp(logits) ** 2``: keeps logits small, so that their rounding does no harm.

    Args:
        router_logits: ``[..., E]``.
        token_mask: bool, shaped like the leading dimensions; False tokens do not count.

    Returns:
        Scalar in float32 (float64 for float64 logits); zero when no token counts.

    Raises:
        ValueError: the mask's shape does not fit.

    Example::

        >>> import torch
        >>> from scattermoe import router_z_loss
        >>> router_z_loss(torch.zeros(4, 1) + 3)
        tensor(9.)

    Source: ST-MoE, https://arxiv.org/abs/2202.08906.
    """
    _check_mask(router_logits, token_mask)
    squares = _wide(router_logits).logsumexp(-1).square()
    if token_mask is None:
        return squares.sum() / max(squares.numel(), 1)
    return squares.where(token_mask, 0).sum() / token_mask.sum().clamp(min=1)


def load_balancing_loss(
    router_logits: Tensor,
    expert_ids: Tensor,
    *,
    scoring: str = "softmax",
    balance: str = "batch",
    token_mask: Tensor | None = None,
    expert_load: Tensor | None = None,
) -> Tensor:
    """``E * sum_e f_e * P_e``: with f the slots per token that expert e received, and P its mean probability.

    It is ``K`` when the load is even, whatever the number of experts (Switch's 1 for K = 1; divide by K for DeepSeek's
    scale), and grows to ``K * E`` when all goes to one expert. The gradient flows through P alone.

    Args:
        router_logits: ``[..., E]``; ``[B, S, E]`` for ``balance="sequence"``.
        expert_ids: ``[..., K]`` integer; ids outside ``[0, E)`` are not counted.
        scoring: ``"softmax"``, or ``"sigmoid"``: each token's scores divided by their sum.
        balance: ``"batch"`` over all tokens, or ``"sequence"``: within each sequence, averaged over the sequences.
        token_mask: bool, shaped like the leading dimensions; False tokens do not count.
        expert_load: ``[E]`` slots per expert if already counted; used by ``balance="batch"``.

    Returns:
        Scalar in float32 (float64 for float64 logits); zero when no token counts.

    Raises:
        ValueError: unknown scoring or balance, shapes that do not fit.

    Example::

        >>> import torch
        >>> from scattermoe import load_balancing_loss
        >>> logits = torch.eye(4)
        >>> load_balancing_loss(logits, logits.argmax(-1, keepdim=True))
        tensor(1.)

    Source: Switch Transformer, equations 4 to 6, https://arxiv.org/abs/2101.03961; sequence-wise: DeepSeek-V3, equations 17
    to 20, https://arxiv.org/abs/2412.19437.
    """
    _check_mask(router_logits, token_mask)
    if router_logits.shape[:-1] != expert_ids.shape[:-1]:
        raise ValueError(
            f"expected router_logits and expert_ids with the same leading dimensions, "
            f"got {list(router_logits.shape)} and {list(expert_ids.shape)}"
        )
    if balance not in BALANCES:
        raise ValueError(f"expected balance to be one of {', '.join(BALANCES)}, got {balance!r}")
    if balance == "sequence" and router_logits.dim() < 3:
        raise ValueError(f"expected router_logits of shape [batch, sequence, experts], got {list(router_logits.shape)}")

    num_experts = router_logits.size(-1)
    sequence = balance == "sequence"
    tokens = router_logits.size(-2) if sequence else math.prod(router_logits.shape[:-1])
    sequences = math.prod(router_logits.shape[:-2]) if sequence else 1
    probs = _probabilities(_wide(router_logits), scoring).reshape(sequences, tokens, num_experts)
    ids = expert_ids.reshape(sequences, tokens, expert_ids.size(-1))
    count: Tensor | int = max(tokens, 1)
    if token_mask is not None:
        mask = token_mask.reshape(sequences, tokens, 1)
        probs = probs.where(mask, 0)
        ids = ids.where(mask, num_experts)
        count = mask.sum(1).clamp(min=1)
    counted = expert_load is not None and not sequence
    load = expert_load.detach().unsqueeze(0) if counted else _count(ids, num_experts)
    per_sequence = (load.to(probs.dtype) / count * (probs.sum(1) / count)).sum(-1) * num_experts
    return per_sequence.sum() / max(sequences, 1)


def router_aux(
    router_logits: Tensor,
    expert_ids: Tensor,
    expert_offsets: Tensor,
    *,
    scoring: str = "softmax",
    balance: str = "batch",
    token_mask: Tensor | None = None,
    losses: bool = True,
) -> MoEAux:
    """Gather a layer's :class:`MoEAux` from what its router and its routing already know.

    Args:
        router_logits: ``[..., E]``.
        expert_ids: ``[..., K]`` with sentinels where ``token_mask`` is False.
        expert_offsets: ``[E + 1]`` of the routing; its differences are the load.
        scoring: the router's scoring.
        balance: ``"batch"`` or ``"sequence"``; see :func:`load_balancing_loss`.
        token_mask: bool, shaped like the leading dimensions.
        losses: False leaves both losses out (None).

    Returns:
        :class:`MoEAux`.

    Raises:
        ValueError: see :func:`load_balancing_loss`.

    Example::

        >>> import torch
        >>> from scattermoe.losses import router_aux
        >>> logits = torch.eye(4)
        >>> aux = router_aux(logits, logits.argmax(-1, keepdim=True), torch.arange(5))
        >>> aux.expert_load
        tensor([1, 1, 1, 1])
    """
    expert_load = expert_offsets.diff()
    if not losses:
        return MoEAux(None, None, expert_load, router_logits)
    balancing = load_balancing_loss(
        router_logits,
        expert_ids,
        scoring=scoring,
        balance=balance,
        token_mask=token_mask,
        expert_load=expert_load,
    )
    return MoEAux(balancing, router_z_loss(router_logits, token_mask), expert_load, router_logits)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _probabilities(logits: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax":
        return logits.softmax(-1)
    if scoring == "sigmoid":
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    raise ValueError(f"expected scoring to be softmax or sigmoid, got {scoring!r}")


def _count(ids: Tensor, num_experts: int) -> Tensor:
    """Count ids ``[B, S, K]`` into ``[B, E]`` without a synchronisation; ids outside ``[0, E)`` fall off the end."""
    ids = ids.where((ids >= 0) & (ids < num_experts), num_experts).flatten(1).long()
    counts = torch.zeros(ids.size(0), num_experts + 1, dtype=torch.int32, device=ids.device)
    return counts.scatter_add(1, ids, torch.ones_like(ids, dtype=torch.int32))[:, :num_experts]


def _check_mask(router_logits: Tensor, token_mask: Tensor | None) -> None:
    if token_mask is not None and token_mask.shape != router_logits.shape[:-1]:
        raise ValueError(
            f"expected token_mask.shape == router_logits.shape[:-1], "
            f"got {list(token_mask.shape)} and {list(router_logits.shape[:-1])}"
        )
