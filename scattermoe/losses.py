"""What a training loop wants to know of a router: balance, size of the logits, load of the experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .load import check_integer, count_ids
from .router import expert_scores

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
        dropped_share: scalar float32, the share of the tokens' choices that was dropped, less those that token rounding
            added. None where every choice is served.
    """

    load_balancing_loss: Tensor | None
    z_loss: Tensor | None
    expert_load: Tensor
    router_logits: Tensor
    dropped_share: Tensor | None = None


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
    router_logits: Tensor | Sequence[Tensor],
    expert_ids: Tensor | Sequence[Tensor],
    *,
    scoring: str = "softmax",
    balance: str = "batch",
    num_groups: int | None = None,
    token_mask: Tensor | None = None,
    expert_load: Tensor | None = None,
) -> Tensor:
    """``E * sum_e f_e * P_e``: with f the slots per token that expert e received, and P its mean probability.

    It is ``K`` when the load is even, whatever the number of experts (Switch's 1 for K = 1), and grows to ``K * E`` when all
    goes to one expert. The gradient flows through P alone. Who published what:

    ======================================== =============================================================
    Switch Transformer                       ``load_balancing_loss(logits, ids)`` with one id per token
    Mixtral, and what transformers computes  lists with one entry per layer, ``token_mask`` of the padding
    DeepSeek-V2, expert level                divided by K; with ``balance="sequence"`` in its own code
    DeepSeek-V2, device level                divided by K; ``num_groups`` devices
    DeepSeek-V3                              divided by K; ``scoring="sigmoid"``, ``balance="sequence"``
    ======================================== =============================================================

    Layers given together are counted together: expert 0 of one layer makes up for expert 0 of another. The mean of the layers'
    own losses (:class:`scattermoe.MoE` returns them) is stricter.

    Args:
        router_logits: ``[..., E]``; ``[B, S, E]`` for ``balance="sequence"``. Or a list of them, one per layer.
        expert_ids: ``[..., K]`` integer, what the router chose (before anything is dropped); ids outside ``[0, E)`` are not
            counted. Or a list of them.
        scoring: ``"softmax"``, or ``"sigmoid"``: each token's scores divided by their sum.
        balance: ``"batch"`` over all tokens, or ``"sequence"``: within each sequence, averaged over the sequences.
        num_groups: balance that many groups of neighbouring experts (devices) instead of single experts; divides E.
        token_mask: bool, shaped like the leading dimensions; False tokens do not count. One for all layers.
        expert_load: ``[E]`` slots per expert if already counted; used by ``balance="batch"``.

    Returns:
        Scalar in float32 (float64 for float64 logits); zero when no token counts.

    Raises:
        TypeError: ``expert_ids`` are not integers.
        ValueError: unknown scoring or balance, shapes or numbers of layers that do not fit, groups that do not divide E.

    Example::

        >>> import torch
        >>> from scattermoe import load_balancing_loss
        >>> logits = torch.eye(4)
        >>> load_balancing_loss(logits, logits.argmax(-1, keepdim=True))
        tensor(1.)

    Source: Switch Transformer, equations 4 to 6, https://arxiv.org/abs/2101.03961; device level: DeepSeek-V2, equations 26 to
    28, https://arxiv.org/abs/2405.04434; sequence-wise: DeepSeek-V3, equations 17 to 20, https://arxiv.org/abs/2412.19437.
    """
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    chosen = [expert_ids] if isinstance(expert_ids, Tensor) else list(expert_ids)
    if not layers or len(layers) != len(chosen):
        raise ValueError(
            f"expected router_logits and expert_ids of the same layers, at least one, got {len(layers)} and {len(chosen)}"
        )
    if balance not in BALANCES:
        raise ValueError(f"expected balance to be one of {', '.join(BALANCES)}, got {balance!r}")
    num_experts = layers[0].size(-1)
    if num_groups is not None and (num_groups < 1 or num_experts % num_groups != 0):
        raise ValueError(
            f"expected num_groups to divide the experts, got num_groups={num_groups} and {num_experts} experts"
        )
    sequence = balance == "sequence"
    shape = layers[0].shape[:-1]
    for logits, ids in zip(layers, chosen, strict=True):
        _check_mask(logits, token_mask)
        check_integer(ids)
        if logits.shape[:-1] != ids.shape[:-1]:
            raise ValueError(
                f"expected router_logits and expert_ids with the same leading dimensions, "
                f"got {list(logits.shape)} and {list(ids.shape)}"
            )
        if logits.shape != layers[0].shape:
            raise ValueError(
                f"expected router_logits of one shape in all layers, got {list(logits.shape)} and {list(layers[0].shape)}"
            )
    if sequence and len(shape) < 2:
        raise ValueError(f"expected router_logits of shape [batch, sequence, experts], got {list(layers[0].shape)}")

    tokens = shape[-1] if sequence else math.prod(shape)
    sequences = math.prod(shape[:-1]) if sequence else 1
    mask = None if token_mask is None else token_mask.reshape(sequences, tokens, 1)
    count: Tensor | int = max(tokens, 1) if mask is None else mask.sum(1).clamp(min=1)
    counted = expert_load is not None and not sequence
    load: Tensor | int = expert_load.detach().unsqueeze(0) if counted else 0
    probability: Tensor | int = 0
    for logits, ids in zip(layers, chosen, strict=True):
        probs = _probabilities(logits, scoring).reshape(sequences, tokens, num_experts)
        ids = ids.reshape(sequences, tokens, ids.size(-1))
        if mask is not None:
            probs = probs.where(mask, 0)
            ids = ids.where(mask, num_experts)
        probability = probability + probs.sum(1)
        if not counted:
            load = load + count_ids(ids.flatten(1), num_experts)
    count = count * len(layers)
    share, probability = load.to(probability.dtype) / count, probability / count
    if num_groups is not None:
        # A group's share is the mean of its experts', its probability the sum: an even load is K again.
        share = share.unflatten(-1, (num_groups, -1)).mean(-1)
        probability = probability.unflatten(-1, (num_groups, -1)).sum(-1)
    return (share * probability).sum() * num_experts / max(sequences, 1)


def router_aux(
    router_logits: Tensor,
    expert_ids: Tensor,
    expert_offsets: Tensor,
    *,
    scoring: str = "softmax",
    balance: str = "batch",
    token_mask: Tensor | None = None,
    losses: bool = True,
    changed: bool = False,
) -> MoEAux:
    """Gather a layer's :class:`MoEAux` from what its router and its routing already know.

    Args:
        router_logits: ``[..., E]``.
        expert_ids: ``[..., K]``, the router's choice, with sentinels where ``token_mask`` is False.
        expert_offsets: ``[E + 1]`` of the routing; its differences are the load.
        scoring: the router's scoring.
        balance: ``"batch"`` or ``"sequence"``; see :func:`load_balancing_loss`.
        token_mask: bool, shaped like the leading dimensions.
        losses: False leaves both losses out (None).
        changed: the routing is not the router's choice: the loss counts the choice, and ``dropped_share`` compares them.

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
    chosen, dropped_share = expert_load, None
    if changed:
        chosen = count_ids(expert_ids.reshape(1, -1), router_logits.size(-1)).squeeze(0)
        total = chosen.sum()
        dropped_share = (total - expert_offsets[-1]) / total.clamp(min=1)
    balancing = z_loss = None
    if losses:
        balancing = load_balancing_loss(
            router_logits, expert_ids, scoring=scoring, balance=balance, token_mask=token_mask, expert_load=chosen
        )
        z_loss = router_z_loss(router_logits, token_mask)
    return MoEAux(balancing, z_loss, expert_load, router_logits, dropped_share)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _probabilities(router_logits: Tensor, scoring: str) -> Tensor:
    scores = expert_scores(router_logits, scoring)
    if scoring == "softmax":
        return scores
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def _check_mask(router_logits: Tensor, token_mask: Tensor | None) -> None:
    if token_mask is not None and token_mask.shape != router_logits.shape[:-1]:
        raise ValueError(
            f"expected token_mask.shape == router_logits.shape[:-1], "
            f"got {list(token_mask.shape)} and {list(router_logits.shape[:-1])}"
        )
