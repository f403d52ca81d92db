"""Who gets which token when a token's own choice is not the last word: capacity, expert choice, token rounding.

Everything here takes and returns what a router does, gates and expert ids ``[T, K]``, and says "no expert" by the id E, the
sentinel that :func:`scattermoe.route` and all operators skip. So nothing is copied or padded, a token that lost all its
experts comes out as zero, and the gates' gradients are those of the slots that are left. No function waits for the device.

All three rules are one: put the slots of each expert in order of preference, and keep the first so many.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .functional import route
from .load import check_integer
from .router import expert_scores

__all__ = ["expert_capacity", "expert_choice", "limit_capacity", "round_to_tiles"]

ROUNDINGS = ("nearest", "up", "down")


def expert_capacity(
    num_tokens: int | Tensor, num_experts: int, top_k: int = 1, capacity_factor: float = 1.0
) -> int | Tensor:
    """The slots an expert may have: ``ceil(num_tokens * top_k / num_experts * capacity_factor)``.

    Args:
        num_tokens: T, or an integer tensor (``token_mask.sum()``) that only the device knows.
        num_experts: E.
        top_k: K, experts per token.
        capacity_factor: 1 is just enough for an even load.

    Returns:
        An int, or an int64 tensor where ``num_tokens`` is a tensor.

    Raises:
        ValueError: a number of experts, a ``top_k`` or a factor that is not positive.

    Example::

        >>> from scattermoe import expert_capacity
        >>> expert_capacity(num_tokens=64, num_experts=8, top_k=2, capacity_factor=1.25)
        20

    Source: Switch Transformer, equation 3, https://arxiv.org/abs/2101.03961.
    """
    if num_experts < 1:
        raise ValueError(f"expected num_experts >= 1, got {num_experts}")
    if top_k < 1:
        raise ValueError(f"expected top_k >= 1, got {top_k}")
    if not capacity_factor > 0:
        raise ValueError(f"expected capacity_factor > 0, got {capacity_factor}")
    if isinstance(num_tokens, Tensor):
        return (num_tokens.double() * top_k / num_experts * capacity_factor).ceil().long()
    return math.ceil(num_tokens * top_k / num_experts * capacity_factor)


def limit_capacity(expert_ids: Tensor, num_experts: int, capacity: int | Tensor, gates: Tensor | None = None) -> Tensor:
    """Drop the slots that are too many for their expert.

    The gates of a token's other slots stay as they are, as in Switch and GShard.

    Args:
        expert_ids: ``[T, K]`` any integer dtype; ids outside ``[0, E)`` take no place.
        num_experts: E.
        capacity: the most slots an expert keeps; an int, or an integer tensor, ``[]`` or ``[E]``. See
            :func:`expert_capacity`.
        gates: ``[T, K]``: each expert keeps the slots with the highest gates, among equal ones the earlier. None keeps the
            first slots in order of tokens, which lets a token's fate depend on what comes before it alone.

    Returns:
        ``expert_ids`` as int64, with E where a slot was dropped.

    Raises:
        ValueError: shapes that do not fit, a negative capacity.

    Example::

        >>> import torch
        >>> from scattermoe import limit_capacity
        >>> ids, gates = torch.tensor([[0], [0], [1]]), torch.tensor([[0.3], [0.9], [0.4]])
        >>> limit_capacity(ids, num_experts=2, capacity=1).T, limit_capacity(ids, 2, 1, gates).T
        (tensor([[0, 2, 1]]), tensor([[2, 0, 1]]))

    Source: GShard, https://arxiv.org/abs/2006.16668; Switch Transformer, https://arxiv.org/abs/2101.03961; by gate, after the
    batch prioritized routing of whole tokens: https://arxiv.org/abs/2106.05974.
    """
    _check_choice(expert_ids, gates)
    if isinstance(capacity, Tensor):
        if capacity.shape not in ((), (num_experts,)):
            raise ValueError(f"expected capacity of shape [] or [{num_experts}], got {list(capacity.shape)}")
    elif capacity < 0:
        raise ValueError(f"expected capacity >= 0, got {capacity}")
    order = None if gates is None else _by_preference(gates)
    return _keep_first(expert_ids.long(), num_experts, capacity, order)


def expert_choice(
    router_logits: Tensor,
    capacity: int | Tensor,
    max_experts: int,
    *,
    scoring: str = "softmax",
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Let every expert pick its tokens instead of every token its experts: an even load without a loss.

    Each expert takes the ``capacity`` tokens that score it highest, so that tokens are served by different numbers of
    experts, some by none. A token's picks depend on the other tokens, later ones included: for encoders and training, not
    for decoding token by token.

    Args:
        router_logits: ``[T, E]``, any floating dtype.
        capacity: tokens per expert; an int or an integer tensor. ``expert_capacity(T, E, c)`` makes it c experts per token
            on average.
        max_experts: M, the slots of a token. A token that more experts picked keeps those with its M highest scores; E
            loses none. Operators set aside memory for all ``T * M`` slots though they compute the taken ones only, and a
            little above c is enough for nearly all tokens.
        scoring: ``"softmax"`` or ``"sigmoid"``.
        token_mask: bool ``[T]``; a False token is picked by none.

    Returns:
        ``gates``, the scores, float32 (float64 for float64 logits) ``[T, M]``, differentiable, descending over a token's
        slots and zero in the unused ones behind; and ``expert_ids``, int64 ``[T, M]``, E in unused slots.

    Raises:
        ValueError: shapes that do not fit, a negative capacity, ``max_experts`` outside ``[1, E]``, an unknown scoring.

    Example::

        >>> import torch
        >>> from scattermoe import expert_choice, route
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
        >>> gates, expert_ids = expert_choice(logits, capacity=1, max_experts=2)
        >>> expert_ids
        tensor([[0, 2],
                [2, 2],
                [1, 2]])
        >>> route(expert_ids, num_experts=2).expert_counts
        tensor([1, 1], dtype=torch.int32)

    Source: Zhou et al. 2022, https://arxiv.org/abs/2202.09368.
    """
    if router_logits.dim() != 2:
        raise ValueError(f"expected router_logits of shape [tokens, experts], got {list(router_logits.shape)}")
    num_tokens, num_experts = router_logits.shape
    if not 1 <= max_experts <= num_experts:
        raise ValueError(f"expected 1 <= max_experts <= experts, got {max_experts} and {num_experts}")
    if token_mask is not None and token_mask.shape != (num_tokens,):
        raise ValueError(f"expected token_mask of shape [{num_tokens}], got {list(token_mask.shape)}")
    scores = expert_scores(router_logits, scoring)
    ids = torch.arange(num_experts, device=scores.device).expand(num_tokens, num_experts)
    if token_mask is not None:
        ids = ids.where(token_mask.bool().unsqueeze(1), num_experts)
    # Expert choice is a token choice of all experts from which each expert drops what is beyond its capacity.
    ids = limit_capacity(ids, num_experts, capacity, scores)
    picked = ids < num_experts
    # Scores are not negative: those of unused slots go behind, and stay in order of ids among themselves.
    order = scores.detach().where(picked, -1).sort(dim=1, descending=True, stable=True).indices[:, :max_experts]
    return scores.where(picked, 0).gather(1, order), ids.gather(1, order)


def round_to_tiles(
    gates: Tensor,
    expert_ids: Tensor,
    scores: Tensor,
    tile: int,
    rounding: str = "nearest",
    max_experts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Move every expert's number of slots to a multiple of the row tile of its matrix products, so that no tile is half full.

    Rounding down drops an expert's slots with the lowest gates. Rounding up adds the tokens that score the expert highest
    among those which did not choose it; such an extra slot has its score as gate, and the gates of the token's own choices
    stay as they are. Where there are too few tokens to add, the count is rounded down instead.

    Args:
        gates: ``[T, K]``, floating dtype, from the router.
        expert_ids: ``[T, K]`` any integer dtype; ids outside ``[0, E)`` take no place, and a token that has nothing else
            (padding) is added to no expert.
        scores: ``[T, E]``, floating dtype, the gates the other experts would have; see
            :func:`scattermoe.router.expert_scores`.
        tile: rows of a tile, for instance 128.
        rounding: ``"nearest"`` (a half goes up), ``"up"`` or ``"down"``.
        max_experts: M, the slots of a token: it can be added to the ``M - K`` best of the experts that it did not choose. E
            is the rule as published; None is ``K + 1``, which costs memory for one more slot per token. Unused with
            ``"down"``, which needs K.

    Returns:
        ``gates`` in their dtype and ``expert_ids`` int64, both ``[T, M]``: the token's own choices first, E where a slot is
        dropped or unused.

    Raises:
        ValueError: shapes that do not fit, ``tile`` below 1, ``max_experts`` outside ``[K, E]``, an unknown rounding.

    Example::

        >>> import torch
        >>> from scattermoe import round_to_tiles, route, topk_gating
        >>> logits = torch.randn(64, 4)
        >>> gates, expert_ids = topk_gating(logits, k=2)
        >>> gates, expert_ids = round_to_tiles(gates, expert_ids, logits.softmax(-1), tile=8)
        >>> route(expert_ids, num_experts=4).expert_counts % 8
        tensor([0, 0, 0, 0], dtype=torch.int32)

    Source: token rounding of SonicMoE, https://arxiv.org/abs/2512.14080.
    """
    _check_choice(expert_ids, gates)
    num_tokens, top_k = expert_ids.shape
    if scores.dim() != 2 or scores.size(0) != num_tokens:
        raise ValueError(f"expected scores of shape [{num_tokens}, experts], got {list(scores.shape)}")
    num_experts = scores.size(1)
    if tile < 1:
        raise ValueError(f"expected tile >= 1, got {tile}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"expected rounding to be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if max_experts is None:
        max_experts = min(top_k + 1, num_experts)
    if not top_k <= max_experts <= max(top_k, num_experts):
        raise ValueError(
            f"expected top_k <= max_experts <= experts, got top_k={top_k}, max_experts={max_experts} and "
            f"{num_experts} experts"
        )
    ids = expert_ids.long()
    valid = (ids >= 0) & (ids < num_experts)
    ids = ids.where(valid, num_experts)
    chosen = route(ids, num_experts).expert_counts
    order = _by_preference(gates)
    extra = 0 if rounding == "down" else max_experts - top_k
    if extra > 0:
        # Every expert but the chosen ones, the best first; the column of the sentinel is for the slots of no expert.
        taken = ids.new_zeros(num_tokens, num_experts + 1, dtype=torch.bool).scatter(1, ids, True)[:, :num_experts]
        best = (
            scores.detach().masked_fill(taken, -math.inf).sort(dim=1, descending=True, stable=True).indices[:, :extra]
        )
        more = best.where(valid.any(1, keepdim=True), num_experts)
        more_gates = scores.gather(1, best).to(gates.dtype)
        ids, gates = torch.cat((ids, more), 1), torch.cat((gates, more_gates), 1)
        # Own choices come before extra slots, whatever their gates.
        slots = torch.arange(ids.numel(), device=ids.device).view_as(ids)
        own, added = slots[:, :top_k].reshape(-1), slots[:, top_k:].reshape(-1)
        order = torch.cat((own[order], added[_by_preference(more_gates)]))
    up = {"nearest": tile // 2, "up": tile - 1, "down": 0}[rounding]
    available = route(ids, num_experts).expert_counts
    count = torch.minimum((chosen + up) // tile, available // tile) * tile
    return gates, _keep_first(ids, num_experts, count, order)


def _by_preference(gates: Tensor) -> Tensor:
    """The slots in order of falling gates, ``[S]``; NaN comes first, equal ones stay in order."""
    return gates.detach().reshape(-1).sort(descending=True, stable=True).indices


def _keep_first(expert_ids: Tensor, num_experts: int, quota: int | Tensor, order: Tensor | None) -> Tensor:
    """Keep the first ``quota`` slots of each expert in the given order of all slots; the others get the sentinel E.

    ids are int64 ``[T, K]``.
    """
    flat = expert_ids.reshape(-1)
    ordered = flat if order is None else flat[order]
    _, position, offsets = route(ordered, num_experts)
    # Grouping is stable, so that the place inside a group is the rank among the expert's slots.
    valid = (ordered >= 0) & (ordered < num_experts)
    expert = ordered.where(valid, 0)
    rank = position.squeeze(1) - offsets[expert]
    if isinstance(quota, Tensor) and quota.dim() == 1:
        quota = quota[expert]
    keep = valid & (rank < quota)
    if order is not None:
        keep = torch.empty_like(keep).scatter(0, order, keep)
    return expert_ids.where(keep.view_as(expert_ids), num_experts)


def _check_choice(expert_ids: Tensor, gates: Tensor | None) -> None:
    check_integer(expert_ids)
    if expert_ids.dim() != 2:
        raise ValueError(f"expected expert_ids of shape [tokens, choices], got {list(expert_ids.shape)}")
    if gates is not None and gates.shape != expert_ids.shape:
        raise ValueError(
            f"expected gates.shape == expert_ids.shape, got {list(gates.shape)} and {list(expert_ids.shape)}"
        )
