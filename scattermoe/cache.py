"""Key-value caches for decoding with :class:`scattermoe.MixtureOfAttention`."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KVCache", "StaticKVCache"]


class KVCache:
    """A cache that grows by concatenation: simple, differentiable, for eager decoding.

    Example::

        >>> import torch
        >>> from scattermoe import KVCache
        >>> cache = KVCache()
        >>> keys, values = cache.update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
        >>> keys, values = cache.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
        >>> keys.shape, cache.length
        (torch.Size([1, 2, 4, 8]), 4)
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """How many positions the cache holds."""
        return 0 if self.keys is None else self.keys.size(2)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions.

        Args:
            keys: ``[B, num_kv_heads, S, head_dim]``.
            values: likewise.

        Returns:
            ``(keys, values)`` of all positions so far, ``[B, num_kv_heads, length, head_dim]``.

        Raises:
            ValueError: values are not like keys, or batch, heads, width or dtype differ from what the cache holds.
        """
        _check_fits(keys, values, self.keys)
        if self.keys is not None:
            keys = torch.cat((self.keys, keys), dim=2)
            values = torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def reorder(self, indices: Tensor) -> None:
        """Keep the given rows of the batch, in that order, as beam search needs it.

        Args:
            indices: ``[B']`` int64.
        """
        if self.keys is not None:
            self.keys = self.keys.index_select(0, indices)
            self.values = self.values.index_select(0, indices)

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None


class StaticKVCache:
    """A cache of fixed size that is written in place: constant shapes for ``torch.compile`` and CUDA graphs.

    The number of positions it holds lives on the device, so a captured or compiled step advances it by itself.
    For inference: it keeps no gradient history.

    Args:
        batch_size: B.
        num_kv_heads: heads of keys and values.
        max_length: how many positions fit.
        head_dim: width of a head.
        device: where to keep the cache.
        dtype: dtype of keys and values.

    Example::

        >>> import torch
        >>> from scattermoe import StaticKVCache
        >>> cache = StaticKVCache(1, 2, 16, 8)
        >>> keys, values = cache.update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
        >>> keys.shape, cache.length
        (torch.Size([1, 2, 16, 8]), tensor(3))
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (batch_size, num_kv_heads, max_length, head_dim)
        # Zeros, not empty: attention multiplies unused values by zero, and 0 * NaN would leak.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros((), device=self.keys.device, dtype=torch.int64)
        self.max_length = max_length
        self._eager_length = 0

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new positions behind those the cache holds.

        Args:
            keys: ``[B, num_kv_heads, S, head_dim]``.
            values: likewise.

        Returns:
            ``(keys, values)``: the whole buffers, ``[B, num_kv_heads, max_length, head_dim]``. What lies behind ``length``
            must be masked.

        Raises:
            ValueError: values are not like keys, batch, heads, width or dtype differ from the cache's, or the new positions
                do not fit in.
            RuntimeError: a gradient would have to flow through the cache.
        """
        _check_fits(keys, values, self.keys)
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise RuntimeError(
                "expected no gradient through a StaticKVCache: decode under torch.no_grad() or use KVCache"
            )
        new = keys.size(2)
        if new > self.max_length:
            raise ValueError(f"expected at most {self.max_length} positions, got {new} more")
        # Reading the device's count would wait for the device, so eager calls count along on the host. Compiled and
        # captured steps do not; there index_copy_ itself refuses an index outside the buffer.
        if not torch.compiler.is_compiling():
            if self._eager_length + new > self.max_length:
                raise ValueError(
                    f"expected at most {self.max_length} positions, got {self._eager_length} and {new} more"
                )
            self._eager_length += new
        positions = self.length + torch.arange(new, device=self.length.device)
        self.keys.index_copy_(2, positions, keys)
        self.values.index_copy_(2, positions, values)
        self.length += new
        return self.keys, self.values

    def reorder(self, indices: Tensor) -> None:
        """Keep the given rows of the batch, in that order, as beam search needs it.

        Args:
            indices: ``[B]`` int64.

        Raises:
            ValueError: not as many indices as the cache has rows.
        """
        if indices.shape != self.keys.shape[:1]:
            raise ValueError(f"expected indices of shape [{self.keys.size(0)}], got {list(indices.shape)}")
        self.keys.copy_(self.keys.index_select(0, indices))
        self.values.copy_(self.values.index_select(0, indices))

    def reset(self) -> None:
        """Forget everything; the buffers stay."""
        self.keys.zero_()
        self.values.zero_()
        self.length.zero_()
        self._eager_length = 0


def _check_fits(keys: Tensor, values: Tensor, held: Tensor | None) -> None:
    if values.shape != keys.shape or values.dtype != keys.dtype:
        raise ValueError(
            f"expected values like keys, {list(keys.shape)} {keys.dtype}, got {list(values.shape)} {values.dtype}"
        )
    if held is None:
        if keys.dim() != 4:
            raise ValueError(f"expected keys of shape [batch, heads, positions, head_dim], got {list(keys.shape)}")
        return
    if keys.dim() != 4 or keys.shape[:2] != held.shape[:2] or keys.size(3) != held.size(3):
        raise ValueError(
            f"expected keys of shape [{held.size(0)}, {held.size(1)}, positions, {held.size(3)}] as the cache holds, "
            f"got {list(keys.shape)}"
        )
    if keys.dtype != held.dtype:
        raise ValueError(f"expected keys of the cache's dtype {held.dtype}, got {keys.dtype}")
