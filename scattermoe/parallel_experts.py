"""ScatterMoE 0.3's building blocks, with its names, arguments and layouts, over this package's operators.

New code is better served by :func:`scattermoe.route` and :func:`scattermoe.parallel_linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional, kernels
from .activations import has_hooks

__all__ = ["ParallelExperts", "flatten_sort_count", "is_bare", "parallel_linear"]


@torch.no_grad()
def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the slots by expert and count them, all on the device.

    Args:
        expert_idxs: the experts of each token, ``[T, K]`` or any other shape, an integer dtype.
        num_experts: E.

    Returns:
        ``sorted_expert_idxs`` ``[S]`` (dtype of ``expert_idxs``), the expert of each row in grouped order;
        ``sorted_scattered_idxs`` ``[S]`` int64, the slot of each row in grouped order (slots of one expert stay in order);
        ``expert_offsets`` ``[E]`` int64, the end of each expert's rows.

    Raises:
        TypeError: the ids are not integers.
        ValueError: ``num_experts`` is below 1.

    Example::

        >>> import torch
        >>> from scattermoe.parallel_experts import flatten_sort_count
        >>> flatten_sort_count(torch.tensor([[1, 0], [1, 2]]), num_experts=3)
        (tensor([0, 1, 1, 2]), tensor([1, 0, 2, 3]), tensor([1, 3, 4]))

    Source: Scattered Mixture-of-Experts, https://arxiv.org/abs/2403.08245.
    """
    flat = expert_idxs.reshape(-1)
    routing = functional.route(flat, num_experts)
    order = routing.slot_order.long()
    return flat[order], order, routing.expert_offsets[1:].long()


def parallel_linear(
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """Apply each row's expert to it: ScatterMoE's signature, with weights ``[E, in, out]``.

    Args:
        inputs: ``[S / k, in]``; row ``s // k`` belongs to slot s. With ``grouped_in``, ``[S, in]`` sorted by expert.
        expert_weights: ``[E, in, out]``, most often ``weight.permute(0, 2, 1)`` of a ``[E, out, in]`` parameter.
        k: how many slots share one row of ``inputs``.
        sorted_expert_idxs: ``[S]``, from :func:`flatten_sort_count`.
        sorted_scattered_idxs: ``[S]``, from :func:`flatten_sort_count`.
        expert_offsets: ``[E]``, from :func:`flatten_sort_count`.
        expert_biases: ``[E, out]`` or None.
        gates: ``[T, K]`` with ``T * K == S``: the K rows of a token are weighted and added up. None keeps every row.
        grouped_in: ``inputs`` is sorted by expert.
        grouped_out: the result is sorted by expert, otherwise it is in slot order.

    Returns:
        ``[S, out]``, or ``[T, out]`` with ``gates``; in ``inputs``' dtype.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: sizes that do not fit, or ``gates`` together with ``grouped_out``, which has no meaning: the rows of a
            token are not neighbours in grouped order.

    Example::

        >>> import torch
        >>> from scattermoe.parallel_experts import flatten_sort_count, parallel_linear
        >>> x, w = torch.randn(5, 8), torch.randn(4, 8, 6)
        >>> gates, experts = torch.rand(5, 2), torch.randint(4, (5, 2))
        >>> parallel_linear(x, w, 2, *flatten_sort_count(experts, 4), gates=gates).shape
        torch.Size([5, 6])

    Source: Scattered Mixture-of-Experts, https://arxiv.org/abs/2403.08245.
    """
    slots = sorted_scattered_idxs.size(0)
    if inputs.dim() != 2 or inputs.size(0) * k != slots:
        raise ValueError(
            f"expected inputs of shape [{slots} / k, in] for k={k} and {slots} sorted_scattered_idxs, "
            f"got {list(inputs.shape)}"
        )
    if expert_weights.dim() != 3:
        raise ValueError(f"expected expert_weights of shape [experts, in, out], got {list(expert_weights.shape)}")
    if expert_offsets.size(0) != expert_weights.size(0):
        raise ValueError(
            f"expected expert_offsets.size(0) == expert_weights.size(0), "
            f"got {expert_offsets.size(0)} and {expert_weights.size(0)}"
        )
    if gates is not None:
        if grouped_out:
            raise ValueError("expected grouped_out to be False when there are gates, got True")
        if gates.dim() != 2 or gates.numel() != slots:
            raise ValueError(f"expected gates of shape [tokens, k] with {slots} elements, got {list(gates.shape)}")
    slot_order = sorted_scattered_idxs.to(torch.int32)
    offsets = nn.functional.pad(expert_offsets, (1, 0)).to(torch.int32)
    rows = torch.ops.scattermoe.parallel_linear(
        inputs,
        expert_weights.transpose(1, 2),
        expert_biases,
        slot_order,
        offsets,
        k,
        grouped_in,
        grouped_out,
        kernels.ops.ALLOW_TF32,
    )
    if gates is None:
        return rows
    # Where each slot went: the inverse of the sort. Slots behind the last expert are in no group.
    grouped = torch.arange(slots, dtype=torch.int32, device=inputs.device)
    grouped = torch.where(grouped < offsets[-1], grouped, -1)
    slot_position = torch.empty_like(slot_order).scatter(0, sorted_scattered_idxs.long(), grouped).view_as(gates)
    return torch.ops.scattermoe.combine(rows, gates, slot_order, slot_position, False)


class ParallelExperts(nn.Module):
    """One linear layer per expert, with ScatterMoE 0.3's arguments, parameter names and shapes.

    Args:
        num_experts: E.
        input_size: columns of each expert's weight.
        output_size: rows of each expert's weight.
        bias: add a bias per expert.
        device: where to create the parameters.
        dtype: floating dtype of the parameters.

    Parameters: ``weight`` ``[E, output_size, input_size]``; ``bias`` ``[E, output_size]`` or None.

    Raises:
        ValueError: ``num_experts`` is below 1.

    Example::

        >>> import torch
        >>> from scattermoe.parallel_experts import ParallelExperts, flatten_sort_count
        >>> experts = ParallelExperts(4, 8, 16)
        >>> order = flatten_sort_count(torch.randint(4, (5, 2)), num_experts=4)
        >>> experts(torch.randn(5, 8), 2, *order, grouped_out=True).shape
        torch.Size([10, 16])

    Source: Scattered Mixture-of-Experts, https://arxiv.org/abs/2403.08245.
    """

    def __init__(
        self,
        num_experts: int,
        input_size: int,
        output_size: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"expected num_experts >= 1, got {num_experts}")
        self.num_experts = num_experts
        self.input_size = input_size
        self.output_size = output_size
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(num_experts, output_size, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from a normal distribution of standard deviation 0.02 and zero the biases."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"num_experts={self.num_experts}, input_size={self.input_size}, output_size={self.output_size}"

    def forward(
        self,
        inputs: Tensor,
        k: int,
        sorted_expert_idxs: Tensor,
        sorted_scattered_idxs: Tensor,
        expert_offsets: Tensor,
        gates: Tensor | None = None,
        grouped_in: bool = False,
        grouped_out: bool = False,
    ) -> Tensor:
        """Apply each row's expert to it; see :func:`parallel_linear` for the arguments and the result."""
        return parallel_linear(
            inputs,
            self.weight.permute(0, 2, 1),
            k,
            sorted_expert_idxs,
            sorted_scattered_idxs,
            expert_offsets,
            expert_biases=self.bias,
            gates=gates,
            grouped_in=grouped_in,
            grouped_out=grouped_out,
        )


def is_bare(layer: nn.Module) -> bool:
    """Tell whether a layer of experts is its weights and nothing more, so that a fused operator may take them.

    Args:
        layer: a :class:`ParallelExperts`, wrapped or not.

    Returns:
        False for a layer that must be called to have its effect: one with hooks or with a forward of its own, as adapters
        and sharding give it.

    Example::

        >>> from scattermoe.parallel_experts import ParallelExperts, is_bare
        >>> is_bare(ParallelExperts(4, 8, 16))
        True
    """
    return type(layer).forward is ParallelExperts.forward and not has_hooks(layer)
