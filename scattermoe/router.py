"""The router: scores every token against every expert and picks each token's experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import functional
from .experts import initialize

__all__ = ["RouterOutput", "TopKRouter", "expert_scores", "update_selection_bias"]

SCORINGS = ("softmax", "sigmoid")


class RouterOutput(NamedTuple):
    """What a router decides.

    Attributes:
        gates: ``[T, K]`` float32 (float64 for float64 logits), descending.
        expert_ids: ``[T, K]`` int64.
        logits: ``[T, E]`` scores before softmax or sigmoid.
    """

    gates: Tensor
    expert_ids: Tensor
    logits: Tensor


def expert_scores(router_logits: Tensor, scoring: str = "softmax") -> Tensor:
    """A token's score for each expert, of which gates are made: softmax over the experts, or a sigmoid for each.

    Args:
        router_logits: ``[..., E]``, any floating dtype.
        scoring: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        ``[..., E]``, float32 (float64 for float64 logits).

    Raises:
        ValueError: unknown scoring.

    Example::

        >>> import torch
        >>> from scattermoe.router import expert_scores
        >>> expert_scores(torch.zeros(1, 4))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    if scoring == "softmax":
        return logits.softmax(-1)
    if scoring == "sigmoid":
        return logits.sigmoid()
    raise ValueError(f"expected scoring to be one of {', '.join(SCORINGS)}, got {scoring!r}")


@torch.no_grad()
def update_selection_bias(bias: Tensor, expert_load: Tensor, rate: float = 1e-3) -> Tensor:
    """Move a selection bias one step towards balance, in place: up for idle experts, down for busy ones.

    This replaces the balancing loss (or most of it): the bias takes part in choosing experts and in nothing else, so it
    disturbs no gradient. Call it once per optimiser step; with data parallelism, sum ``expert_load`` over the ranks first.

    Args:
        bias: ``[E]`` floating dtype, changed in place.
        expert_load: ``[E]``, how many slots (or which share of them) each expert received, any dtype.
        rate: size of the step.

    Returns:
        ``bias``.

    Raises:
        TypeError: ``bias`` is not floating.
        ValueError: the shapes differ.

    Example::

        >>> import torch
        >>> from scattermoe import update_selection_bias
        >>> update_selection_bias(torch.zeros(3), torch.tensor([5, 1, 3]), rate=0.25)
        tensor([-0.2500,  0.2500,  0.0000])

    Source: auxiliary-loss-free load balancing, https://arxiv.org/abs/2408.15664; DeepSeek-V3, https://arxiv.org/abs/2412.19437.
    """
    if not bias.is_floating_point():
        raise TypeError(f"expected bias of a floating dtype, got {bias.dtype}")
    if bias.shape != expert_load.shape:
        raise ValueError(
            f"expected expert_load.shape == bias.shape, got {list(expert_load.shape)} and {list(bias.shape)}"
        )
    load = expert_load.to(bias.device, torch.float32)
    return bias.add_((load.mean() - load).sign_().to(bias.dtype), alpha=rate)


class _UpcastLinear(torch.autograd.Function):
    """``x @ weight.T`` in a wider dtype that keeps x for backward as it came, not its wide copy.

    With g the gradient of the logits: dx = g @ weight, dweight = g.T @ x.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if _on_tensor_cores(x, weight) and dtype == torch.float32:
            # Products of such numbers are exact in float32, so this is the float32 result at many times the speed.
            return torch.mm(x, weight.t(), out_dtype=dtype)
        return x.to(dtype) @ weight.to(dtype).t()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, dtype = inputs
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        # The results are rounded to x's and weight's dtype anyway, as any layer's of that dtype are.
        dtype = x.dtype if _on_tensor_cores(x, weight) else ctx.dtype
        grad = grad.to(dtype)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.t() @ x.to(dtype)).to(weight.dtype)
        return grad_x, grad_weight, None


def _on_tensor_cores(x: Tensor, weight: Tensor) -> bool:
    return x.is_cuda and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)


class TopKRouter(nn.Module):
    """A linear router with top-k selection.

    Logits are computed in float32 at least, also for bfloat16 models and under autocast: a rounded logit flips choices.

    Args:
        hidden_size: H, width of the tokens.
        num_experts: E.
        top_k: K, experts per token; at most E.
        scoring: ``"softmax"`` over the experts, or ``"sigmoid"`` of each expert by itself (DeepSeek-V3).
        normalize_gates: make a token's gates add up to one. ``"detach"`` does so without sending a gradient through the
            sum (Mixture of Attention Heads). None normalises when ``top_k > 1``: for one expert per token it would turn
            every gate into 1 and starve the router (Switch).
        selection_bias: keep a buffer ``e_score_correction_bias`` ``[E]`` that is added to the scores for choosing, never
            to the gates; see :meth:`update_selection_bias`.
        num_groups: split the experts into that many groups of neighbours; only ``top_groups`` of them serve a token.
        top_groups: how many groups serve a token.
        scale: factor on all gates (DeepSeek's ``routed_scaling_factor``).
        jitter: in training, multiply the router's input by uniform noise from ``[1 - jitter, 1 + jitter]`` (Switch).
        bias: add a bias to the logits.
        upcast: compute the logits in float32 when x is bfloat16 or float16. False keeps x's dtype, as most inference code.
        init_std: standard deviation of the initial weight.
        device: where to create the parameters.
        dtype: floating dtype of the parameters.

    Parameters: ``weight`` ``[E, H]``; ``bias`` ``[E]`` if asked for. Buffer: ``e_score_correction_bias`` ``[E]``, float32
    whatever the module is cast to, because its steps are finer than bfloat16.

    Raises:
        ValueError: ``top_k`` above ``num_experts``, groups that do not divide the experts or hold fewer than ``top_k``
            experts, an unknown scoring.

    Example::

        >>> import torch
        >>> from scattermoe import TopKRouter
        >>> router = TopKRouter(16, num_experts=8, top_k=2)
        >>> gates, expert_ids, logits = router(torch.randn(5, 16))
        >>> gates.shape, expert_ids.shape, logits.shape
        (torch.Size([5, 2]), torch.Size([5, 2]), torch.Size([5, 8]))

    Source: Switch Transformer, https://arxiv.org/abs/2101.03961; DeepSeek-V3, https://arxiv.org/abs/2412.19437; Mixture of
    Attention Heads, https://arxiv.org/abs/2210.05144.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        normalize_gates: bool | str | None = None,
        selection_bias: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        jitter: float = 0.0,
        bias: bool = False,
        upcast: bool = True,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_router(num_experts, top_k, scoring, normalize_gates, num_groups, top_groups, jitter)
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.scoring = scoring
        self.normalize_gates = top_k > 1 if normalize_gates is None else normalize_gates
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.scale = scale
        self.jitter = jitter
        self.upcast = upcast
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        correction = torch.empty(num_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution of standard deviation ``init_std``; zero all biases."""
        initialize(self.named_parameters(recurse=False), self.init_std)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def extra_repr(self) -> str:
        """Sizes and rules, for ``print(module)``."""
        parts = [
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}",
            f"scoring={self.scoring!r}, normalize_gates={self.normalize_gates!r}",
        ]
        if self.num_groups > 1:
            parts.append(f"num_groups={self.num_groups}, top_groups={self.top_groups}")
        if self.scale != 1.0:
            parts.append(f"scale={self.scale}")
        if self.jitter:
            parts.append(f"jitter={self.jitter}")
        return ", ".join(parts)

    def _apply(self, fn, recurse: bool = True):
        kept = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if kept is not None and moved.dtype != kept.dtype:
            self.e_score_correction_bias = kept.to(moved.device) if not kept.is_meta else moved.to(kept.dtype)
        return self

    def update_selection_bias(self, expert_load: Tensor, rate: float = 1e-3) -> None:
        """Move ``e_score_correction_bias`` one step towards balance; see :func:`update_selection_bias`.

        Args:
            expert_load: ``[E]`` slots per expert since the last step, summed over data-parallel ranks.
            rate: size of the step.

        Raises:
            RuntimeError: the router was built without ``selection_bias=True``.
        """
        if self.e_score_correction_bias is None:
            raise RuntimeError("expected a router built with selection_bias=True, got one without")
        update_selection_bias(self.e_score_correction_bias, expert_load, rate)

    def logits(self, x: Tensor) -> Tensor:
        """Score tokens against experts.

        Args:
            x: ``[T, H]``.

        Returns:
            ``[T, E]``, float32 for narrower x unless ``upcast`` is False.
        """
        if self.training and self.jitter > 0:
            x = x * torch.empty_like(x).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._linear(x)
        return self._linear(x)

    def _linear(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        if self.upcast:
            dtype = torch.promote_types(dtype, torch.float32)
        if x.dtype == self.weight.dtype == dtype:
            return F.linear(x, self.weight, self.bias)
        logits = _UpcastLinear.apply(x, self.weight, dtype)
        return logits if self.bias is None else logits + self.bias.to(dtype)

    def forward(self, x: Tensor) -> RouterOutput:
        """Pick each token's experts.

        Args:
            x: tokens ``[T, H]``.

        Returns:
            :class:`RouterOutput`: gates ``[T, K]``, expert ids ``[T, K]``, logits ``[T, E]``.

        Raises:
            ValueError: x is not ``[T, H]``.
        """
        if x.dim() != 2 or x.size(1) != self.hidden_size:
            raise ValueError(f"expected x of shape [tokens, {self.hidden_size}], got {list(x.shape)}")
        logits = self.logits(x)
        correction = self.e_score_correction_bias
        gates, expert_ids = functional.topk_gating(
            logits,
            self.top_k,
            scoring=self.scoring,
            normalize=self.normalize_gates is True,
            selection_bias=None if correction is None else correction.to(logits.dtype),
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            scale=self.scale,
        )
        if self.normalize_gates == "detach":
            gates = gates * (self.scale / gates.detach().sum(-1, keepdim=True))
        return RouterOutput(gates, expert_ids, logits)


def _check_router(num_experts, top_k, scoring, normalize_gates, num_groups, top_groups, jitter) -> None:
    if num_experts < 1:
        raise ValueError(f"expected num_experts >= 1, got {num_experts}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"expected 1 <= top_k <= num_experts, got top_k={top_k} and num_experts={num_experts}")
    if scoring not in SCORINGS:
        raise ValueError(f"expected scoring to be one of {', '.join(SCORINGS)}, got {scoring!r}")
    if normalize_gates not in (None, True, False, "detach"):
        raise ValueError(f"expected normalize_gates to be True, False, None or 'detach', got {normalize_gates!r}")
    if num_groups < 1 or num_experts % num_groups != 0:
        raise ValueError(
            f"expected num_experts to be a multiple of num_groups, got num_experts={num_experts} and num_groups={num_groups}"
        )
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"expected 1 <= top_groups <= num_groups, got {top_groups} and {num_groups}")
    if top_k > top_groups * (num_experts // num_groups):
        raise ValueError(
            f"expected top_k <= experts in top_groups, got top_k={top_k} and {top_groups} groups of "
            f"{num_experts // num_groups} experts"
        )
    if not 0 <= jitter < 1:
        raise ValueError(f"expected 0 <= jitter < 1, got {jitter}")
