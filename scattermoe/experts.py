"""The expert MLPs of a Mixture-of-Experts layer, and the MLP that every token shares."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import functional
from .activations import apply_activation, apply_glu, check_glu_layout, is_gated

__all__ = ["Experts", "SharedExpert"]


def initialize(parameters: Iterable[tuple[str, nn.Parameter]], std: float) -> None:
    """Draw weights from a normal distribution of standard deviation ``std`` and zero what is called a bias."""
    for name, parameter in parameters:
        if parameter.is_meta:
            continue  # nothing to draw, and PyTorch would load its compiler to do so
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=std)


class ExpertParameters(nn.Module):
    """A module whose parameters have a slice for each expert."""

    init_std: float

    def _create(
        self, device: torch.device | str | None, dtype: torch.dtype | None, **shapes: tuple[int, ...] | None
    ) -> None:
        for name, shape in shapes.items():
            parameter = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from a normal distribution of standard deviation ``init_std`` and zero the biases."""
        initialize(self.named_parameters(recurse=False), self.init_std)


class Experts(ExpertParameters):
    """E two-layer MLPs, run for routed tokens by the fused :func:`scattermoe.moe_mlp`.

    Args:
        num_experts: E.
        hidden_size: H, width of the tokens.
        intermediate_size: I, width of each expert.
        activation: ``"swiglu"``, ``"geglu"``, ``"geglu_tanh"``, ``"reglu"``, ``"swiglu_clamped"``, ``"silu"``, ``"gelu"``,
            ``"gelu_tanh"``, ``"relu"``, ``"relu2"`` or ``"identity"``.
        glu_layout: order of a gated up-projection's rows: ``"gate_up"`` (Hugging Face), ``"up_gate"`` (ScatterMoE) or
            ``"interleaved"`` (gpt-oss).
        bias: give both layers of every expert a bias.
        alpha: slope of ``"swiglu_clamped"``.
        limit: clamp of ``"swiglu_clamped"``.
        recompute: keep only the input for backward and compute the pre-activations again: least memory, one more product.
        init_std: standard deviation of the initial weights.
        device: where to create the parameters.
        dtype: floating dtype of the parameters.

    Parameters, named as in fused checkpoints: ``gate_up_proj`` ``[E, 2I, H]`` (``up_proj`` ``[E, I, H]`` for a plain
    activation), ``down_proj`` ``[E, H, I]``; with ``bias`` also ``gate_up_proj_bias`` (``up_proj_bias``) and
    ``down_proj_bias``.

    Raises:
        ValueError: unknown activation or layout, ``num_experts`` below 1.

    Example::

        >>> import torch
        >>> from scattermoe import Experts, route
        >>> experts = Experts(4, 16, 32)
        >>> gates, expert_ids = torch.rand(5, 4).topk(2)
        >>> experts(torch.randn(5, 16), gates, route(expert_ids, 4)).shape
        torch.Size([5, 16])

    Source: Scattered Mixture-of-Experts, https://arxiv.org/abs/2403.08245; SonicMoE, https://arxiv.org/abs/2512.14080.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        glu_layout: str = "gate_up",
        bias: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        recompute: bool = False,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_glu_layout(glu_layout)
        if num_experts < 1:
            raise ValueError(f"expected num_experts >= 1, got {num_experts}")
        gated = is_gated(activation)
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.glu_layout = glu_layout
        self.alpha = alpha
        self.limit = limit
        self.recompute = recompute
        self.init_std = init_std
        self._up_name = "gate_up_proj" if gated else "up_proj"
        up_size = 2 * intermediate_size if gated else intermediate_size

        shapes = {
            self._up_name: (num_experts, up_size, hidden_size),
            "down_proj": (num_experts, hidden_size, intermediate_size),
            f"{self._up_name}_bias": (num_experts, up_size) if bias else None,
            "down_proj_bias": (num_experts, hidden_size) if bias else None,
        }
        self._create(device, dtype, **shapes)

    def extra_repr(self) -> str:
        """Sizes and activation, for ``print(module)``."""
        text = (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, activation={self.activation!r}"
        )
        return f"{text}, glu_layout={self.glu_layout!r}" if is_gated(self.activation) else text

    def forward(self, x: Tensor, gates: Tensor, routing: functional.Routing) -> Tensor:
        """Run every token's experts and add up what they return, weighted by the gates.

        Args:
            x: tokens ``[T, H]``.
            gates: ``[T, K]``, float32 or x's dtype.
            routing: from :func:`scattermoe.route`.

        Returns:
            ``[T, H]`` in x's dtype.
        """
        return functional.moe_mlp(
            x,
            getattr(self, self._up_name),
            self.down_proj,
            gates,
            routing,
            activation=self.activation,
            glu_layout=self.glu_layout,
            up_bias=getattr(self, f"{self._up_name}_bias"),
            down_bias=self.down_proj_bias,
            alpha=self.alpha,
            limit=self.limit,
            recompute=self.recompute,
        )


class SharedExpert(nn.Module):
    """The MLP that every token passes through beside its own experts.

    Args:
        hidden_size: H.
        intermediate_size: width of the MLP.
        activation: as in :class:`Experts`.
        bias: give the layers a bias.
        alpha: slope of ``"swiglu_clamped"``.
        limit: clamp of ``"swiglu_clamped"``.
        init_std: standard deviation of the initial weights.
        device: where to create the parameters.
        dtype: floating dtype of the parameters.

    Parameters, named as in Qwen2-MoE and DeepSeek checkpoints: ``gate_proj.weight`` (gated activations only) and
    ``up_proj.weight`` ``[I, H]``, ``down_proj.weight`` ``[H, I]``.

    Raises:
        ValueError: unknown activation.

    Example::

        >>> import torch
        >>> from scattermoe import SharedExpert
        >>> SharedExpert(16, 32)(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])

    Source: DeepSeekMoE, https://arxiv.org/abs/2401.06066.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.alpha = alpha
        self.limit = limit
        self.init_std = init_std
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **options) if is_gated(activation) else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from a normal distribution of standard deviation ``init_std`` and zero the biases."""
        initialize(self.named_parameters(), self.init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Run the MLP.

        Args:
            x: tokens ``[..., H]``.

        Returns:
            ``[..., H]``.
        """
        if self.gate_proj is None:
            h = apply_activation(self.up_proj(x), self.activation)
        else:
            h = apply_glu(self.gate_proj(x), self.up_proj(x), self.activation, self.alpha, self.limit)
        return self.down_proj(h)
