"""Rotary position embedding in the half-split convention of Llama and JetMoE."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_rotary", "rotary_embedding"]


def rotary_embedding(
    positions: Tensor, head_dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines that rotate queries and keys; one call can serve all layers of a model.

    Args:
        positions: positions ``[...]`` of any integer or floating dtype.
        head_dim: D, even.
        theta: base of the frequencies.
        dtype: floating dtype of the result. Angles are computed in float32, in float64 for float64.

    Returns:
        ``(cos, sin)``, each ``[..., D]``: the D/2 angles of a position, twice.

    Raises:
        ValueError: ``head_dim`` is odd.

    Example::

        >>> import torch
        >>> from scattermoe.rotary import rotary_embedding
        >>> cos, sin = rotary_embedding(torch.arange(5), head_dim=8)
        >>> cos.shape, cos[0].sum()
        (torch.Size([5, 8]), tensor(8.))

    Source: RoFormer, https://arxiv.org/abs/2104.09864.
    """
    if head_dim % 2:
        raise ValueError(f"expected an even head_dim for rotary positions, got {head_dim}")
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device) / head_dim
    angles = positions.to(wide).unsqueeze(-1) * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs ``(x[i], x[i + D/2])`` by their position's angles.

    Args:
        x: ``[..., D]``.
        cos: cosines that broadcast against x, ``[..., D]``.
        sin: sines, likewise.

    Returns:
        x's shape and dtype.

    Example::

        >>> import torch
        >>> from scattermoe.rotary import apply_rotary, rotary_embedding
        >>> cos, sin = rotary_embedding(torch.arange(5), head_dim=8)
        >>> x = torch.randn(2, 5, 8)
        >>> torch.allclose(apply_rotary(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
        True

    Source: RoFormer, https://arxiv.org/abs/2104.09864.
    """
    cos1, cos2 = cos.to(x.dtype).chunk(2, dim=-1)
    sin1, sin2 = sin.to(x.dtype).chunk(2, dim=-1)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2), dim=-1)
