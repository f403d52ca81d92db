"""Expert MLPs and linear maps with a low-rank addend to each expert's weight, which is never formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional
from ..functional import Routing
from ..kernels import ops as _switches

__all__ = ["LowRank", "moe_mlp", "parallel_linear"]


class LowRank(NamedTuple):
    """What is added to the weights ``W`` of E experts: ``scale * B @ A``.

    Attributes:
        A: ``[E, r, in]``.
        B: ``[E, out, r]``. A and B may have another floating dtype than the rows, to which they are then rounded.
        scale: factor on the product.
        dropout: the share of the elements of the input that A does not see.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0


def parallel_linear(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    low_rank: LowRank | None,
    bias: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """Apply each slot's expert to its row, ``y[s] = (weight + scale * B @ A)[e(s)] @ x[row(s)] + bias[e(s)]``.

    Args:
        x: rows as :func:`scattermoe.parallel_linear` takes them; a floating dtype.
        weight: ``[E, out, in]``. If it is frozen, x is kept for backward only for A.
        routing: from :func:`scattermoe.route`.
        low_rank: the addend; None for none.
        bias: ``[E, out]`` or None.
        grouped_in: whether the rows of x are in grouped order.
        grouped_out: whether to return rows in grouped order.

    Returns:
        ``[S, out]`` in x's dtype (autocast's under autocast); rows of sentinel slots are zero.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes or devices that do not fit.

    Example::

        >>> import torch
        >>> from scattermoe import lora, route
        >>> routing = route(torch.tensor([[0, 1], [1, 2]]), num_experts=3)
        >>> addend = lora.LowRank(torch.randn(3, 2, 8), torch.randn(3, 16, 2), scale=0.5)
        >>> lora.parallel_linear(torch.randn(2, 8), torch.randn(3, 16, 8), routing, addend).shape
        torch.Size([4, 16])

    Source: LoRA, https://arxiv.org/abs/2106.09685; Scattered Mixture-of-Experts, https://arxiv.org/abs/2403.08245.
    """
    y = functional.parallel_linear(x, weight, routing, bias, grouped_in, grouped_out)
    if low_rank is None:
        return y
    a, b = low_rank.A.to(y.dtype), low_rank.B.to(y.dtype)
    dropped = torch.nn.functional.dropout(x, low_rank.dropout)
    middle = functional.parallel_linear(dropped, a, routing, grouped_in=grouped_in, grouped_out=True)
    addend = functional.parallel_linear(middle * low_rank.scale, b, routing, grouped_in=True, grouped_out=grouped_out)
    return y.add_(addend)


def moe_mlp(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gates: Tensor,
    routing: Routing,
    *,
    up: LowRank | None = None,
    down: LowRank | None = None,
    activation: str | Callable[[Tensor], Tensor] = "swiglu",
    glu_layout: str = "gate_up",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.702,
    limit: float = 7.0,
    recompute: bool = False,
) -> Tensor:
    """Compute a mixture-of-experts MLP whose weights have low-rank addends, with the saved state of the MLP alone.

    For backward it keeps what :func:`scattermoe.moe_mlp` keeps and the ``[S, r]`` rows between the up-projection's A and B; with
    dropout also a byte for each element of A's input. Only gradients that are asked for are computed: none of a frozen weight.
    A second derivative is an error.

    Args:
        x: ``[T, H]``, a floating dtype.
        w_up: ``[E, 2 * I, H]`` for a gated activation and ``[E, I, H]`` for a plain one. Under autocast it is cast when it is
            used, and the copy is not kept.
        w_down: ``[E, H', I]``.
        gates: ``[T, K]``, any floating dtype.
        routing: from :func:`scattermoe.route`.
        up: what is added to w_up; None for nothing.
        down: what is added to w_down.
        activation: a name, as in :func:`scattermoe.moe_mlp`, or a function of the pre-activations ``[S, up rows]``, which is
            differentiated by autograd and keeps what it needs.
        glu_layout: the order of w_up's rows where the activation is gated by its name.
        up_bias: ``[E, up rows]`` or None.
        down_bias: ``[E, H']`` or None.
        alpha: slope of ``swiglu_clamped``.
        limit: clamp of ``swiglu_clamped``.
        recompute: keep x and not the pre-activations, which are computed again.

    Returns:
        ``[T, H']`` in x's dtype (autocast's under autocast).

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes or devices that do not fit, an unknown ``activation`` or ``glu_layout``, or ``recompute`` with a
            function as activation.

    Example::

        >>> import torch
        >>> from scattermoe import lora, route
        >>> gates, expert_ids = torch.rand(5, 4).topk(2)
        >>> up = lora.LowRank(torch.randn(4, 2, 8), torch.zeros(4, 32, 2), scale=2.0)
        >>> w_up, w_down = torch.randn(4, 32, 8), torch.randn(4, 8, 16)
        >>> lora.moe_mlp(torch.randn(5, 8), w_up, w_down, gates, route(expert_ids, 4), up=up).shape
        torch.Size([5, 8])

    Source: LoRA, https://arxiv.org/abs/2106.09685; SonicMoE, https://arxiv.org/abs/2512.14080.
    """
    if up is None and down is None:
        return functional.moe_mlp(
            *(x, w_up, w_down, gates, routing, activation, glu_layout, up_bias, down_bias, alpha, limit, recompute)
        )
    if callable(activation):
        if recompute:
            raise ValueError("moe_mlp: expected a named activation with recompute=True, got a function")
        h = activation(parallel_linear(x, w_up, routing, up, up_bias, grouped_out=True))
        rows = parallel_linear(h, w_down, routing, down, down_bias, grouped_in=True, grouped_out=True)
        return functional.combine(rows, gates, routing)
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, up_bias, down_bias = (t if t is None else t.to(dtype) for t in (x, up_bias, down_bias))
    elif not x.dtype == w_up.dtype == w_down.dtype:
        raise TypeError(
            f"expected x.dtype == w_up.dtype == w_down.dtype, got {x.dtype}, {w_up.dtype} and {w_down.dtype}"
        )
    up_a, up_b, up_keep, up_scale = _factors(up, x, x.shape)
    down_a, down_b, down_keep, down_scale = _factors(down, x, (routing.slot_order.shape[0], w_down.shape[2]))
    return _LowRankMlp.apply(
        *(x, w_up, up_bias, w_down, down_bias, gates, up_a, up_b, down_a, down_b, up_keep, down_keep, *routing),
        *((up_scale, down_scale), (activation, glu_layout, alpha, limit), recompute),
    )


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to x now; like the operators, it leaves float64 alone."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _factors(
    low_rank: LowRank | None, x: Tensor, rows: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, float]:
    """A and B in x's dtype, which elements of A's input ``rows`` are kept (None for all), and the factor on B A."""
    if low_rank is None:
        return None, None, None, 0.0
    a, b, scale, dropout = low_rank
    if dropout == 0:
        return a.to(x.dtype), b.to(x.dtype), None, scale
    keep = torch.rand(rows, device=x.device) >= dropout
    return a.to(x.dtype), b.to(x.dtype), keep, scale / (1 - dropout)


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


# With z = W_up x[t] + s B_up A_up x[t] + b_up the pre-activations of a slot, h = act(z), its row
# y = W_down h + s B_down A_down h + b_down and g its gate, out[t] sums g y over the slots of t. With G = dL/dout:
#     dh'     = W_down^T G[t] + s A_down^T B_down^T G[t]           the gradient of h but for the gate
#     dL/dg   = <G[t], y> = <dh', h> + <G[t], b_down>              y is linear in h, so it is not needed itself
#     dz      = g dh' act'(z)
#     dL/dx   = sum over the slots of t of W_up^T dz + s A_up^T B_up^T dz
#     dL/dA_up   = sum over the expert's slots of (s B_up^T dz) x[t]^T      dL/dB_up   = sum of dz (s A_up x[t])^T
#     dL/dA_down = sum of (s B_down^T G[t]) (g h)^T                         dL/dB_down = sum of G[t] (s A_down g h)^T
# so beside x, z, gates, routing and weights backward reads u = s A_up x alone, r numbers a slot. (It could compute u again,
# but then training B alone would have to keep x.) With dropout, A sees x and h times a mask.
class _LowRankMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_up: Tensor,
        b_up: Tensor | None,
        w_down: Tensor,
        b_down: Tensor | None,
        gates: Tensor,
        up_a: Tensor | None,
        up_b: Tensor | None,
        down_a: Tensor | None,
        down_b: Tensor | None,
        up_keep: Tensor | None,
        down_keep: Tensor | None,
        slot_order: Tensor,
        slot_position: Tensor,
        expert_offsets: Tensor,
        scales: tuple[float, float],
        settings: tuple[str, str, float, float],
        recompute: bool,
    ) -> Tensor:
        routing = Routing(slot_order, slot_position, expert_offsets)
        u = None if up_a is None else _linear(_kept(x, up_keep), up_a, routing) * scales[0]
        z = _pre_activations(x, w_up, b_up, u, up_b, routing)
        h = torch.ops.scattermoe._activation(z, *settings)
        rows = _linear(h, w_down.to(x.dtype), routing, b_down, grouped=True)
        if down_a is not None:
            v = _linear(_kept(h, down_keep), down_a, routing, grouped=True) * scales[1]
            rows += _linear(v, down_b, routing, grouped=True)
        y = functional.combine(rows, gates, routing)

        x_is_read = recompute or ctx.needs_input_grad[1] or ctx.needs_input_grad[6]
        ctx.save_for_backward(
            *(x if x_is_read else None, w_up, b_up if recompute else None, w_down, b_down, gates),
            *(up_a, up_b, down_a, down_b, up_keep, down_keep, slot_order, slot_position, expert_offsets),
            *(u, None if recompute else z),
        )
        ctx.scales = scales
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "scattermoe.lora.moe_mlp does not support second derivatives (create_graph=True); a function as "
                "activation makes it one that does"
            )
        # Read once: checkpointing computes them again and lets go of them.
        x, w_up, b_up, w_down, b_down, gates, *factors, slot_order, slot_position, expert_offsets, u, z = (
            ctx.saved_tensors
        )
        up_a, up_b, down_a, down_b, up_keep, down_keep = factors
        routing = Routing(slot_order, slot_position, expert_offsets)
        need_x, need_w_up, need_b_up, need_w_down, need_b_down, need_gates = ctx.needs_input_grad[:6]
        need_up_a, need_up_b, need_down_a, need_down_b = ctx.needs_input_grad[6:10]
        if z is None:
            z = _pre_activations(x, w_up, b_up, u, up_b, routing)

        # Products with G read its rows by token, where they lie.
        grad_h = _linear(grad, w_down.to(grad.dtype).transpose(1, 2), routing)
        if down_a is not None:
            grad_v = _linear(grad, down_b.transpose(1, 2), routing) * ctx.scales[1]
            grad_h += _kept(_linear(grad_v, down_a.transpose(1, 2), routing, grouped=True), down_keep)
        grad_z, gated_h, grad_gates = torch.ops.scattermoe._activation_backward(
            grad_h, z, gates, routing.slot_order, routing.expert_offsets, *ctx.settings
        )
        del grad_h  # rows [S, I] are let go of where they have been read: the peak is in the products behind
        if need_gates and b_down is not None:
            grad_gates = grad_gates + _by_slot(_linear(grad, b_down.unsqueeze(1), routing), routing).to(gates.dtype)

        # Sums of products of rows with G give dL/dW^T: G can lie by token on one side of them.
        grad_w_down = grad_b_down = grad_down_a = grad_down_b = grad_u = grad_up_a = grad_up_b = None
        if need_w_down:
            grad_w_down = _weight_grad(gated_h, grad, routing).transpose(1, 2).to(w_down.dtype)
        if need_b_down:
            grad_b_down = _weight_grad(_grouped(gates, routing).to(grad.dtype), grad, routing).squeeze(1)
        kept = _kept(gated_h, down_keep) if need_down_a or need_down_b else None
        if need_down_a:
            grad_down_a = _weight_grad(grad_v, kept, routing, grouped=True)
        if need_down_b:
            gated_v = _linear(kept, down_a, routing, grouped=True) * ctx.scales[1]
            grad_down_b = _weight_grad(gated_v, grad, routing).transpose(1, 2)
        del gated_h, kept
        grad_x, grad_w_up, grad_b_up = _linear_backward(
            grad_z, x, w_up.to(grad.dtype), routing, [need_x, need_w_up, need_b_up]
        )
        if up_a is not None:
            grad_u, grad_up_b, _ = _linear_backward(
                grad_z, u, up_b, routing, [need_x or need_up_a, need_up_b, False], grouped=True
            )
        if grad_u is not None:
            grad_u = grad_u * ctx.scales[0]
            seen = _kept(x, up_keep) if need_up_a else None
            addend, grad_up_a, _ = _linear_backward(grad_u, seen, up_a, routing, [need_x, need_up_a, False])
            if need_x:
                grad_x += _kept(addend, up_keep)
        return (
            *(grad_x, None if grad_w_up is None else grad_w_up.to(w_up.dtype), grad_b_up),
            *(grad_w_down, grad_b_down, grad_gates if need_gates else None),
            *(grad_up_a, grad_up_b, grad_down_a, grad_down_b),
            *(None,) * 8,
        )


def _linear(x: Tensor, weight: Tensor, routing: Routing, bias: Tensor | None = None, grouped: bool = False) -> Tensor:
    """A product with its result in grouped order, and x in grouped order or one row a token."""
    return functional.parallel_linear(x, weight, routing, bias, grouped_in=grouped, grouped_out=True)


def _linear_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, routing: Routing, mask: list[bool], grouped: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of :func:`_linear` for x, weight and bias that the mask asks for."""
    if not any(mask):
        return None, None, None
    grad_x, grad_weight, grad_bias = torch.ops.scattermoe._parallel_linear_backward(
        grad,
        grad.new_empty(0) if x is None else x,
        weight,
        routing.slot_order,
        routing.expert_offsets,
        1 if grouped else routing.top_k,
        grouped,
        True,
        _switches.ALLOW_TF32,
        mask,
    )
    return grad_x if mask[0] else None, grad_weight if mask[1] else None, grad_bias if mask[2] else None


def _weight_grad(grad: Tensor, x: Tensor, routing: Routing, grouped: bool = False) -> Tensor:
    """The sum over each expert's slots of grad^T x, ``[E, grad's columns, x's columns]``."""
    like = grad.new_empty(routing.num_experts, grad.shape[1], x.shape[1])
    return _linear_backward(grad, x, like, routing, [False, True, False], grouped)[1]


def _pre_activations(
    x: Tensor, w_up: Tensor, b_up: Tensor | None, u: Tensor | None, up_b: Tensor | None, routing: Routing
) -> Tensor:
    z = _linear(x, w_up.to(x.dtype), routing, b_up)
    return z if u is None else z.add_(_linear(u, up_b, routing, grouped=True))


def _grouped(values: Tensor, routing: Routing) -> Tensor:
    """``[T, K]`` as grouped rows ``[S, 1]``; those of sentinels are in no group."""
    return values.flatten()[routing.slot_order.long()].unsqueeze(1)


def _by_slot(rows: Tensor, routing: Routing) -> Tensor:
    """Grouped rows ``[S, 1]`` as ``[T, K]``; zero for sentinels."""
    position = routing.slot_position.long()
    return rows.flatten()[position.clamp(min=0)].where(position >= 0, 0)
