"""Functions over ``torch.ops.scattermoe``: route once, then compute with any number of per-expert linear maps.

Rows are called *scattered* when row ``t * K + j`` belongs to the ``j``-th choice of token ``t``, and *grouped* when they are
sorted by expert. No function moves tokens from one order to the other: they move indices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels import ops as _switches

__all__ = ["Routing", "combine", "moe_mlp", "parallel_linear", "route", "topk_gating"]

# What the operators compute in.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Routing(NamedTuple):
    """Which expert gets which slot: the index tensors that every function here reads.

    ``T`` tokens with ``K`` choices each make ``S = T * K`` slots; slot ``t * K + j`` is the ``j``-th choice of token ``t``.

    Attributes:
        slot_order: int32 ``[S]``, the slot at each grouped position.
        slot_position: int32 ``[T, K]``, the grouped position of each slot; -1 for a slot that is in no group.
        expert_offsets: int32 ``[E + 1]``; expert ``e`` owns grouped positions ``[offsets[e], offsets[e + 1])``.
    """

    slot_order: Tensor
    slot_position: Tensor
    expert_offsets: Tensor

    @property
    def num_tokens(self) -> int:
        """``T``."""
        return self.slot_position.shape[0]

    @property
    def top_k(self) -> int:
        """``K``, the choices of a token."""
        return self.slot_position.shape[1]

    @property
    def num_experts(self) -> int:
        """``E``."""
        return self.expert_offsets.shape[0] - 1

    @property
    def expert_counts(self) -> Tensor:
        """int32 ``[E]``, the slots that each expert got."""
        return self.expert_offsets.diff()


def route(expert_ids: Tensor, num_experts: int) -> Routing:
    """Sort the slots of a routing by expert, on the device and without a host sync.

    The sort is a stable counting sort (ScatterMoE, arXiv 2403.08245, sorts likewise). An id outside ``[0, num_experts)`` is a
    sentinel: its slot is in no group, contributes nothing and gets zero gradient, which is what expert parallelism and
    dropped tokens need.

    Args:
        expert_ids: ``[T, K]`` or ``[T]`` (one choice a token), any integer dtype.
        num_experts: ``E``. May be smaller than ``K``.

    Returns:
        The :class:`Routing`, on the device of ``expert_ids``.

    Raises:
        TypeError: ``expert_ids`` is not of an integer dtype.
        ValueError: ``expert_ids`` has another shape, ``K`` or ``num_experts`` is below 1, or there are 2^31 slots or more.

    Example:
        >>> import torch, scattermoe
        >>> routing = scattermoe.route(torch.tensor([[0, 2], [2, 1]]), num_experts=3)
        >>> routing.slot_order.tolist(), routing.expert_offsets.tolist()
        ([0, 3, 1, 2], [0, 1, 2, 4])
    """
    slot_order, slot_position, expert_offsets = torch.ops.scattermoe.group_by_expert(expert_ids, num_experts)
    if slot_position.dim() == 1:
        slot_position = slot_position.unsqueeze(1)
    return Routing(slot_order, slot_position, expert_offsets)


def parallel_linear(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    bias: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """Apply each slot's expert to its row: ``y[s] = x[row(s)] @ weight[e(s)].T + bias[e(s)]``.

    This is ScatterMoE's ParallelLinear (arXiv 2403.08245): a grouped GEMM that reads its rows where they lie and writes them
    where they belong, forward and backward. It can be differentiated any number of times.

    Args:
        x: scattered rows, ``[T, in]`` (one row a token, read by its ``K`` slots) or ``[T * K, in]`` (one a slot); with
            ``grouped_in`` one a slot in grouped order. float64, float32, bfloat16 or float16.
        weight: ``[E, out, in]`` in the dtype of ``x``; a transposed view of ``[E, in, out]`` is read without a copy.
        routing: from :func:`route`.
        bias: ``[E, out]`` or None.
        grouped_in: whether the rows of ``x`` are in grouped order.
        grouped_out: whether to return rows in grouped order.

    Returns:
        ``[T * K, out]`` in the dtype of ``x``; rows of sentinel slots are zero.

    Raises:
        TypeError: a dtype that does not fit, or a call in the way of ScatterMoE 0.3, which is served by
            :func:`scattermoe.parallel_experts.parallel_linear`.
        ValueError: shapes or devices that do not fit.

    Example:
        >>> import torch, scattermoe
        >>> routing = scattermoe.route(torch.tensor([[0, 1], [1, 2]]), num_experts=3)
        >>> scattermoe.parallel_linear(torch.randn(2, 8), torch.randn(3, 16, 8), routing).shape
        torch.Size([4, 16])
    """
    if isinstance(routing, int):
        raise TypeError(
            "parallel_linear: expected routing to be a Routing from scattermoe.route(expert_ids, num_experts), got an int; "
            "the signature of ScatterMoE 0.3 (x, weight, k, ...) is scattermoe.parallel_experts.parallel_linear"
        )
    # Read from the field: Dynamo of PyTorch 2.9 does not compare what a NamedTuple's property returns.
    num_tokens, top_k = routing.slot_position.shape
    # One row a token where that is how many there are; with K = 1 both readings agree.
    slots_per_row = top_k if not grouped_in and x.shape[0] == num_tokens else 1
    return torch.ops.scattermoe.parallel_linear(
        x,
        weight,
        bias,
        routing.slot_order,
        routing.expert_offsets,
        slots_per_row,
        grouped_in,
        grouped_out,
        _switches.ALLOW_TF32,
    )


def combine(rows: Tensor, gates: Tensor | None, routing: Routing, grouped: bool = True) -> Tensor:
    """Sum the ``K`` rows of each token, weighted by their gates: ``y[t] = sum_j gates[t, j] * row(t, j)``.

    Sums are accumulated in float32 (float64 for float64). A sentinel slot is skipped whatever its gate and its row hold. It can
    be differentiated any number of times.

    Args:
        rows: ``[T * K, H]``, in grouped order or, with ``grouped=False``, in scattered order.
        gates: ``[T, K]``, any floating dtype; None means ones.
        routing: from :func:`route`.
        grouped: the order of ``rows``.

    Returns:
        ``[T, H]`` in the dtype of ``rows``.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes or devices that do not fit.

    Example:
        >>> import torch, scattermoe
        >>> routing = scattermoe.route(torch.tensor([[0, 1], [1, 0]]), num_experts=2)
        >>> scattermoe.combine(torch.ones(4, 3), torch.full((2, 2), 0.5), routing)
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    return torch.ops.scattermoe.combine(rows, gates, routing.slot_order, routing.slot_position, grouped)


def moe_mlp(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gates: Tensor,
    routing: Routing,
    activation: str | Callable[[Tensor], Tensor] = "swiglu",
    glu_layout: str = "gate_up",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
    recompute: bool = False,
) -> Tensor:
    """Compute a whole mixture-of-experts MLP as one differentiable op with the least saved state.

    ``y[t] = sum_j gates[t, j] * (w_down[e] @ act(w_up[e] @ x[t] + up_bias[e]) + down_bias[e])`` with ``e`` the expert of slot
    ``(t, j)``. For backward it keeps ``x``, the pre-activations, the gates, the routing and the weights, and nothing else
    (SonicMoE, arXiv 2512.14080); ``x`` only where ``w_up`` needs a gradient. Only gradients that are asked for are computed. A
    second derivative is an error; :func:`parallel_linear` and :func:`combine` have it.

    Args:
        x: ``[T, H]``; float64, float32, bfloat16 or float16.
        w_up: ``[E, 2 * I, H]`` for a gated activation and ``[E, I, H]`` for a plain one, in the dtype of ``x``.
        w_down: ``[E, H', I]``. Both weights may be transposed views.
        gates: ``[T, K]``, any floating dtype; float32 gates are not rounded, and get a float32 gradient.
        routing: from :func:`route`.
        activation: gated: ``swiglu``, ``geglu``, ``geglu_tanh``, ``reglu``, ``swiglu_clamped`` (gpt-oss); plain: ``silu``,
            ``gelu``, ``gelu_tanh``, ``relu``, ``relu2``, ``identity``. Or any function of ``[S, N]`` pre-activations, ``N`` the
            rows of ``w_up``, to ``[S, I]``: it runs between two :func:`parallel_linear` and a :func:`combine`, which keep
            what PyTorch keeps for such a chain and can be differentiated twice.
        glu_layout: the order of ``w_up``'s rows where a named activation is gated: ``gate_up`` (Hugging Face), ``up_gate``
            (ScatterMoE) or ``interleaved`` (gpt-oss).
        up_bias: ``[E, 2 * I]`` or ``[E, I]``, or None.
        down_bias: ``[E, H']`` or None.
        alpha: slope of ``swiglu_clamped``.
        limit: clamp of ``swiglu_clamped``.
        recompute: keep ``x`` alone and compute the pre-activations again in backward: ``T * H`` saved elements instead of
            ``T * H + T * K * 2 * I``, for one more product. For named activations.

    Returns:
        ``[T, H']`` in the dtype of ``x``.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes or devices that do not fit, an unknown ``activation`` or ``glu_layout``, or ``recompute`` with a
            function as activation.

    Example:
        >>> import torch, scattermoe
        >>> gates, expert_ids = scattermoe.topk_gating(torch.randn(5, 4), k=2)
        >>> routing = scattermoe.route(expert_ids, num_experts=4)
        >>> x, w_up, w_down = torch.randn(5, 8), torch.randn(4, 32, 8), torch.randn(4, 8, 16)
        >>> scattermoe.moe_mlp(x, w_up, w_down, gates, routing).shape
        torch.Size([5, 8])
    """
    if callable(activation):
        if recompute:
            raise ValueError("moe_mlp: expected a named activation with recompute=True, got a function")
        h = activation(parallel_linear(x, w_up, routing, bias=up_bias, grouped_out=True))
        rows = parallel_linear(h, w_down, routing, bias=down_bias, grouped_in=True, grouped_out=True)
        return combine(rows, gates, routing)
    return torch.ops.scattermoe.moe_mlp(
        x,
        w_up,
        up_bias,
        w_down,
        down_bias,
        gates,
        routing.slot_order,
        routing.slot_position,
        routing.expert_offsets,
        activation,
        glu_layout,
        alpha,
        limit,
        _switches.ALLOW_TF32,
        recompute,
    )


def topk_gating(
    logits: Tensor,
    k: int,
    scoring: str = "softmax",
    normalize: bool = False,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Score the experts, pick the best ``k`` of each token and return their gates, in one pass and in float32.

    Args:
        logits: ``[T, E]``, any floating dtype.
        k: experts per token.
        scoring: ``softmax`` (over all experts, before the selection) or ``sigmoid``.
        normalize: divide the gates of a token by their sum.
        selection_bias: ``[E]``, added to the scores for the selection alone (DeepSeek-V3, arXiv 2412.19437); gets no gradient.
        num_groups: the experts form this many equal groups ...
        top_groups: ... and only those in the best ``top_groups`` groups can be picked. A group scores its best expert
            (DeepSeek-V2, arXiv 2405.04434) or, with a ``selection_bias``, the sum of its two best (DeepSeek-V3).
        scale: factor on the gates.

    Returns:
        ``gates``, float32 (float64 for float64 logits) ``[T, k]``, descending, differentiable once; and ``expert_ids``, int64
        ``[T, k]``, distinct and valid even where logits are NaN. Equal scores go to the lower id.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: ``k > E``, groups that do not divide ``E`` or hold fewer than ``k`` experts, or an unknown ``scoring``.

    Example:
        >>> import torch, scattermoe
        >>> gates, expert_ids = scattermoe.topk_gating(torch.tensor([[0.0, 2.0, 1.0]]), k=2, normalize=True)
        >>> expert_ids.tolist(), gates.sum().item()
        ([[1, 2]], 1.0)
    """
    return torch.ops.scattermoe.topk_gating(
        logits, k, scoring, normalize, selection_bias, num_groups, top_groups, scale
    )
