"""The experts of a transformers model, computed by :func:`scattermoe.moe_mlp` on the parameters that the model has."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import functional, lora
from ..activations import activation_name
from ..replace.interface import weight_names

__all__ = ["experts_forward"]

# act_fn(gate) * up, the gates in the first half of the rows: what a module has that brings no gate of its own.
DEFAULT_GATE = "transformers.integrations.moe._default_apply_gate"
# Models' own gates that the fused operator computes as well: layout, and the attributes that hold alpha and limit. Named by
# the function, so that a subclass with another `_apply_gate` is not among them.
_CLAMPED_GATES = {
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts._apply_gate": ("interleaved", "alpha", "limit"),
    "transformers.models.openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts._apply_gate": (
        "gate_up",
        "alpha",
        "limit",
    ),
    "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts._apply_gate": (
        "gate_up",
        "swiglu_alpha",
        "swiglu_limit",
    ),
}


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute a transformers experts module: what ``"scattermoe"`` stands for in the experts interface.

    It is one :func:`scattermoe.moe_mlp`: fused where the activation is one of the operator's, around the model's own
    ``act_fn`` or ``_apply_gate`` where it is not. Adapters of :mod:`scattermoe.lora` take part.

    Args:
        self: a module of a class decorated with ``transformers.integrations.use_experts_implementation``.
        hidden_states: tokens ``[T, H]``, a floating dtype.
        top_k_index: ``[T, K]``, integer. An id outside ``[0, num_experts)`` contributes nothing: expert parallelism marks
            the experts of other ranks by ``num_experts``.
        top_k_weights: ``[T, K]``, a floating dtype.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states``.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes that do not fit.

    Example::

        >>> import torch, transformers, scattermoe.transformers
        >>> config = transformers.MixtralConfig(hidden_size=16, intermediate_size=32, num_local_experts=4)
        >>> experts = transformers.models.mixtral.modeling_mixtral.MixtralExperts(config)
        >>> gates, expert_ids = torch.rand(5, 4).topk(2)
        >>> scattermoe.transformers.experts_forward(experts, torch.randn(5, 16), expert_ids, gates).shape
        torch.Size([5, 16])

    Source: Scattered Mixture-of-Experts, https://arxiv.org/abs/2403.08245; SonicMoE, https://arxiv.org/abs/2512.14080.
    """
    up, down = (getattr(self, name) for name in weight_names(self))
    up_bias, down_bias = (getattr(self, name) if self.has_bias else None for name in bias_names(self))
    if self.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    routing = functional.route(top_k_index, self.num_experts)
    up_addend, down_addend = lora.low_ranks(self._modules.get("lora"), "up", "down")
    y = lora.moe_mlp(
        *(hidden_states, up, down, top_k_weights, routing),
        up=up_addend,
        down=down_addend,
        up_bias=up_bias,
        down_bias=down_bias,
        **_activation(self),
    )
    return y.to(hidden_states.dtype)  # autocast computes in its own dtype


def bias_names(experts: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}_bias" for name in weight_names(experts))


def _activation(experts: nn.Module) -> dict[str, Any]:
    """The arguments of moe_mlp for the activation of a module: a name, or the module's own code."""
    if not experts.has_gate:
        return {"activation": activation_name(experts.act_fn) or experts.act_fn}
    gate = gate_name(experts)
    if gate == DEFAULT_GATE:
        return {"activation": activation_name(experts.act_fn, gated=True) or experts._apply_gate}
    if gate in _CLAMPED_GATES:
        layout, alpha, limit = _CLAMPED_GATES[gate]
        clamps = {"alpha": getattr(experts, alpha), "limit": getattr(experts, limit)}
        return {"activation": "swiglu_clamped", "glu_layout": layout, **clamps}
    return {"activation": experts._apply_gate}


def gate_name(experts: nn.Module) -> str:
    """The full name of the function that a module splits and gates its pre-activations with."""
    function = getattr(experts._apply_gate, "__func__", experts._apply_gate)
    return f"{function.__module__}.{function.__qualname__}"
