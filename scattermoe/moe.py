"""The Mixture-of-Experts layer: router, experts and an optional shared expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional
from .assignment import expert_capacity, expert_choice, limit_capacity, round_to_tiles
from .experts import Experts, SharedExpert, initialize
from .losses import MoEAux
from .routed import RoutedLayer
from .router import expert_scores

__all__ = ["MoE", "MoEAux"]

ROUTINGS = ("token_choice", "expert_choice")
DROPS = ("gate", "position")


class MoE(RoutedLayer):
    """A feed-forward layer of E experts of which each token uses K.

    ``y = sum_j gate_j * expert_j(x)``, plus the shared expert if there is one.

    Args:
        hidden_size: H, width of the tokens.
        intermediate_size: I, width of each expert.
        num_experts: E.
        top_k: K, experts per token; at most E.
        activation: ``"swiglu"``, ``"geglu"``, ``"geglu_tanh"``, ``"reglu"``, ``"swiglu_clamped"``, ``"silu"``, ``"gelu"``,
            ``"gelu_tanh"``, ``"relu"``, ``"relu2"`` or ``"identity"``.
        glu_layout: order of a gated up-projection's rows: ``"gate_up"``, ``"up_gate"`` or ``"interleaved"``.
        bias: give the experts biases.
        alpha: slope of ``"swiglu_clamped"``.
        limit: clamp of ``"swiglu_clamped"``.
        router_bias: give the router a bias.
        scoring: ``"softmax"`` or ``"sigmoid"``.
        normalize_gates: make a token's gates add up to one; None does so when ``top_k > 1``. See :class:`TopKRouter`.
        selection_bias: keep DeepSeek-V3's bias for balancing without a loss; see :meth:`update_selection_bias`.
        num_groups: groups of experts for group-limited routing.
        top_groups: how many groups serve a token.
        scale: factor on all gates.
        jitter: multiplicative noise on the router's input in training.
        routing: ``"token_choice"``: each token picks K experts. ``"expert_choice"``: each expert picks the tokens that score
            it highest, K experts a token on average; see :func:`scattermoe.expert_choice` for what that is good for.
        capacity_factor: drop what is beyond ``ceil(T * K / E * capacity_factor)`` slots of an expert; see
            :func:`scattermoe.limit_capacity`. None drops nothing. Expert choice fills that capacity, and takes None as 1.
        drop: keep an expert's slots with the highest ``"gate"``, or the first ones by ``"position"``.
        token_rounding: tile to whose nearest multiple each expert's slots are moved; see :func:`scattermoe.round_to_tiles`.
        max_experts: slots of a token; for expert choice (E by default) and token rounding (K + 1 by default).
        shared_intermediate_size: width of a shared expert; None for no shared expert.
        shared_gate: scale the shared expert's output by a sigmoid of a learned projection (Qwen2-MoE).
        recompute: keep only the experts' input for backward and compute their pre-activations again: least memory, one more
            product.
        aux_losses: compute ``load_balancing_loss`` and ``z_loss``; False leaves them None and saves their time.
        balance: balance over the ``"batch"`` or within each ``"sequence"`` (input ``[B, S, H]``).
        init_std: standard deviation of the initial weights.
        device: where to create the parameters; ``"meta"`` works, follow it by ``to_empty`` and ``reset_parameters``.
        dtype: floating dtype of the parameters.

    State dict, named as in the fused checkpoints of Mixtral, Qwen2/3-MoE and OLMoE, so that their blocks load unchanged:

    ================================== ================ ======================================================
    ``gate.weight``                    ``[E, H]``       router; ``gate.bias`` ``[E]`` with ``router_bias``
    ``gate.e_score_correction_bias``   ``[E]``          buffer, with ``selection_bias``
    ``experts.gate_up_proj``           ``[E, 2I, H]``   ``experts.up_proj`` ``[E, I, H]`` for a plain activation
    ``experts.down_proj``              ``[E, H, I]``
    ``experts.gate_up_proj_bias``      ``[E, 2I]``      with ``bias``; also ``experts.down_proj_bias`` ``[E, H]``
    ``shared_expert.gate_proj.weight`` ``[I', H]``      and ``up_proj``, ``down_proj``
    ``shared_expert_gate.weight``      ``[1, H]``       with ``shared_gate``
    ================================== ================ ======================================================

    Raises:
        ValueError: ``top_k`` above ``num_experts``, an unknown name, groups that do not fit, ``shared_gate`` without a
            shared expert, options of one way of routing with another.

    Example::

        >>> import torch
        >>> from scattermoe import MoE
        >>> moe = MoE(hidden_size=16, intermediate_size=32, num_experts=8, top_k=2)
        >>> y, aux = moe(torch.randn(2, 5, 16))
        >>> y.shape, aux.expert_load.sum()
        (torch.Size([2, 5, 16]), tensor(20))
        >>> loss = y.square().mean() + 0.01 * aux.load_balancing_loss + 0.001 * aux.z_loss
        >>> loss.backward()

    Source: Switch Transformer, https://arxiv.org/abs/2101.03961; Scattered Mixture-of-Experts,
    https://arxiv.org/abs/2403.08245; DeepSeek-V3, https://arxiv.org/abs/2412.19437.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        glu_layout: str = "gate_up",
        bias: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        router_bias: bool = False,
        scoring: str = "softmax",
        normalize_gates: bool | str | None = None,
        selection_bias: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        jitter: float = 0.0,
        routing: str = "token_choice",
        capacity_factor: float | None = None,
        drop: str = "gate",
        token_rounding: int | None = None,
        max_experts: int | None = None,
        shared_intermediate_size: int | None = None,
        shared_gate: bool = False,
        recompute: bool = False,
        aux_losses: bool = True,
        balance: str = "batch",
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if shared_gate and shared_intermediate_size is None:
            raise ValueError("expected shared_intermediate_size with shared_gate=True, got None")
        if routing == "expert_choice":
            if normalize_gates or selection_bias or num_groups > 1:
                raise ValueError(
                    "expected no normalize_gates, selection_bias or num_groups with routing='expert_choice', which takes "
                    f"scores as they are, got {normalize_gates}, {selection_bias} and {num_groups}"
                )
            capacity_factor = 1.0 if capacity_factor is None else capacity_factor
            max_experts = num_experts if max_experts is None else max_experts
        _check_routing(num_experts, top_k, routing, capacity_factor, drop, token_rounding, max_experts)
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            scoring=scoring,
            normalize_gates=normalize_gates,
            selection_bias=selection_bias,
            num_groups=num_groups,
            top_groups=top_groups,
            scale=scale,
            jitter=jitter,
            bias=router_bias,
            aux_losses=aux_losses,
            balance=balance,
            init_std=init_std,
            device=device,
            dtype=dtype,
        )
        self.routing = routing
        self.capacity_factor = capacity_factor
        self.drop = drop
        self.token_rounding = token_rounding
        self.max_experts = max_experts
        expert_options = {
            "activation": activation,
            "bias": bias,
            "alpha": alpha,
            "limit": limit,
            "init_std": init_std,
            "device": device,
            "dtype": dtype,
        }
        self.experts = Experts(
            num_experts, hidden_size, intermediate_size, glu_layout=glu_layout, recompute=recompute, **expert_options
        )
        self.shared_expert = None
        self.shared_expert_gate = None
        if shared_intermediate_size is not None:
            self.shared_expert = SharedExpert(hidden_size, shared_intermediate_size, **expert_options)
        if shared_gate:
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False, device=device, dtype=dtype)
            initialize(self.shared_expert_gate.named_parameters(), init_std)

    def reset_parameters(self) -> None:
        """Initialise everything again, for instance after ``MoE(..., device="meta").to_empty(device="cpu")``."""
        self.gate.reset_parameters()
        self.experts.reset_parameters()
        if self.shared_expert is not None:
            self.shared_expert.reset_parameters()
        if self.shared_expert_gate is not None:
            initialize(self.shared_expert_gate.named_parameters(), self.init_std)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, MoEAux]:
        """Run the layer.

        Args:
            x: tokens ``[..., H]``.
            token_mask: bool ``[...]``, False for padding: such a token goes to no expert (the shared one still sees it),
                costs nothing, and is left out of the losses and the load.

        Returns:
            ``(y, aux)``: y ``[..., H]`` in x's dtype (autocast's dtype under autocast), and :class:`MoEAux`.

        Raises:
            ValueError: x's last dimension is not ``hidden_size``, or the mask does not fit.
        """
        if x.dim() < 1 or x.size(-1) != self.hidden_size:
            raise ValueError(f"expected x of shape [..., {self.hidden_size}], got {list(x.shape)}")
        leading = x.shape[:-1]
        tokens = x.reshape(-1, self.hidden_size)
        if token_mask is not None:
            if token_mask.shape != leading:
                raise ValueError(
                    f"expected token_mask.shape == x.shape[:-1], got {list(token_mask.shape)} and {list(leading)}"
                )
            token_mask = token_mask.bool()
        logits, chosen, gates, expert_ids = self._assign(tokens, None if token_mask is None else token_mask.reshape(-1))
        routing = functional.route(expert_ids, self.num_experts)
        y = self.experts(tokens, gates, routing)
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(tokens).sigmoid() * shared
            y = y + shared
        aux = self._aux(logits, chosen, routing.expert_offsets, leading, token_mask, changed=chosen is not expert_ids)
        return y.reshape(x.shape), aux

    def _assign(self, tokens: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits ``[T, E]``, the experts that the router chose, and the gates and experts that serve the tokens."""
        capacity = None
        if self.capacity_factor is not None:
            count = tokens.size(0) if token_mask is None else token_mask.sum()
            capacity = expert_capacity(count, self.num_experts, self.top_k, self.capacity_factor)
        if self.routing == "expert_choice":
            logits = self.gate.logits(tokens)
            gates, expert_ids = expert_choice(
                logits, capacity, self.max_experts, scoring=self.gate.scoring, token_mask=token_mask
            )
            return logits, expert_ids, gates * self.gate.scale, expert_ids
        gates, chosen, logits = self.gate(tokens)
        if token_mask is not None:
            chosen = chosen.where(token_mask.unsqueeze(1), self.num_experts)
        expert_ids = chosen
        if capacity is not None:
            expert_ids = limit_capacity(chosen, self.num_experts, capacity, gates if self.drop == "gate" else None)
        if self.token_rounding is not None:
            scores = expert_scores(logits, self.gate.scoring) * self.gate.scale
            gates, expert_ids = round_to_tiles(gates, chosen, scores, self.token_rounding, max_experts=self.max_experts)
        return logits, chosen, gates, expert_ids


def _check_routing(num_experts, top_k, routing, capacity_factor, drop, token_rounding, max_experts) -> None:
    if routing not in ROUTINGS:
        raise ValueError(f"expected routing to be one of {', '.join(ROUTINGS)}, got {routing!r}")
    if drop not in DROPS:
        raise ValueError(f"expected drop to be one of {', '.join(DROPS)}, got {drop!r}")
    if capacity_factor is not None and not capacity_factor > 0:
        raise ValueError(f"expected capacity_factor > 0, got {capacity_factor}")
    if token_rounding is not None:
        if token_rounding < 1:
            raise ValueError(f"expected token_rounding >= 1, got {token_rounding}")
        if capacity_factor is not None:
            raise ValueError(
                f"expected no capacity_factor (expert choice has one) with token_rounding, got {capacity_factor} and "
                f"{token_rounding}"
            )
    if max_experts is not None:
        if routing == "token_choice" and token_rounding is None:
            raise ValueError(
                f"expected max_experts with token_rounding or routing='expert_choice' alone, got {max_experts}"
            )
        fewest = top_k if routing == "token_choice" else 1
        if not fewest <= max_experts <= num_experts:
            raise ValueError(f"expected max_experts in [{fewest}, {num_experts}], got {max_experts}")
