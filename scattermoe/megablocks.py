"""Weights of MegaBlocks' layers, as :class:`scattermoe.MoE` names and lays them out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["from_megablocks"]

_FIRST = "experts.mlp.w1"


def from_megablocks(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the layers of MegaBlocks in a state dict, so that a model of :class:`scattermoe.MoE` loads it.

    A layer is wherever there is a key that ends in ``experts.mlp.w1``; other keys stay as they are. DBRX has the same layout.

    ============================== ==================== ======================== ================
    MegaBlocks                                          MoE
    ============================== ==================== ======================== ================
    ``router.layer.weight``        ``[E, H]``           ``gate.weight``          ``[E, H]``
    ``experts.mlp.w1``             ``[E * I, H]``       ``experts.up_proj``      ``[E, I, H]``
    ``experts.mlp.w1``, ``.v1``    ``[E * I, H]`` each  ``experts.gate_up_proj`` ``[E, 2I, H]``
    ``experts.mlp.w2``             ``[E * I, H]``       ``experts.down_proj``    ``[E, H, I]``
    ============================== ==================== ======================== ================

    The ``w1`` ``[E, H, I]`` and ``w2`` ``[E, I, H]`` of its ``MoE`` (the layer with capacities) become the same. A shared
    expert's keys are the same in both. ``experts.bias`` ``[H]``, which is one bias for the sum over all experts, has no place in
    ``MoE`` and stays in the dict: take it out and add it to the output.

    Args:
        state_dict: tensors by name, of a layer or a model; with expert parallelism or sharding, of the whole of it.

    Returns:
        A new dict. Tensors whose layout does not change are views of those given.

    Raises:
        ValueError: there is no such layer, a part of one is missing, or its shapes do not fit each other.

    Example::

        >>> import torch
        >>> from scattermoe import MoE, from_megablocks
        >>> weights = {"experts.mlp.w1": torch.randn(4 * 32, 16), "experts.mlp.w2": torch.randn(4 * 32, 16)}
        >>> weights["router.layer.weight"] = torch.randn(4, 16)
        >>> moe = MoE(hidden_size=16, intermediate_size=32, num_experts=4, top_k=2, activation="gelu_tanh")
        >>> moe.load_state_dict(from_megablocks(weights))
        <All keys matched successfully>

    Source: MegaBlocks, https://arxiv.org/abs/2211.15841.
    """
    result = dict(state_dict)
    prefixes = [key.removesuffix(_FIRST) for key in state_dict if key == _FIRST or key.endswith("." + _FIRST)]
    if not prefixes:
        raise ValueError(f"expected keys that end in {_FIRST}, got none")
    for prefix in prefixes:
        _convert_layer(result, prefix)
    return result


def _convert_layer(state_dict: dict[str, Tensor], prefix: str) -> None:
    """Replaces the entries of the layer whose names start with a prefix."""

    def take(name: str) -> Tensor:
        if prefix + name not in state_dict:
            raise ValueError(f"expected {prefix}{name} beside {prefix}{_FIRST}, got none")
        return state_dict.pop(prefix + name)

    router = take("router.layer.weight")
    num_experts, hidden_size = router.shape

    def per_expert(name: str, hidden_last: bool) -> Tensor:
        """``[E, I, H]`` of a matrix of all experts, or of one for each."""
        weight = take(name)
        if weight.dim() == 2 and weight.size(0) % num_experts == 0:
            weight = weight.unflatten(0, (num_experts, -1))
        elif weight.dim() == 3 and not hidden_last:
            weight = weight.transpose(1, 2)
        if weight.dim() != 3 or weight.size(0) != num_experts or weight.size(2) != hidden_size:
            raise ValueError(
                f"expected {prefix}{name} to have the rows of {num_experts} experts of hidden size {hidden_size}, as "
                f"{prefix}router.layer.weight, got {list(weight.shape)}"
            )
        return weight

    up = per_expert(_FIRST, hidden_last=False)
    gated = f"{prefix}experts.mlp.v1" in state_dict
    if gated:
        up = torch.cat([up, per_expert("experts.mlp.v1", hidden_last=False)], dim=1)
    state_dict[f"{prefix}gate.weight"] = router
    state_dict[f"{prefix}experts.{'gate_up_proj' if gated else 'up_proj'}"] = up
    state_dict[f"{prefix}experts.down_proj"] = per_expert("experts.mlp.w2", hidden_last=True).transpose(1, 2)
