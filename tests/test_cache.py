"""The key-value caches by themselves; tests/test_attention.py decodes with them."""

import pytest
import torch
from torch import Tensor

from scattermoe import KVCache, StaticKVCache


def rows(positions: int, **options: object) -> Tensor:
    return torch.randn(2, 3, positions, 4, **options)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_update_reorder_reset(device: str, static: bool) -> None:
    cache = StaticKVCache(2, 3, 9, 4, device=device) if static else KVCache()
    keys, values = rows(7, device=device), rows(7, device=device)
    for start, end in ((0, 4), (4, 4), (4, 5), (5, 7)):
        held = cache.update(keys[:, :, start:end], values[:, :, start:end])
        assert int(cache.length) == end
        for got, want in zip(held, (keys, values), strict=True):
            assert torch.equal(got[:, :, :end], want[:, :, :end])
    cache.reorder(torch.tensor([1, 1], device=device))
    assert torch.equal(cache.keys[:, :, :7], keys[[1, 1]]) and torch.equal(cache.values[:, :, :7], values[[1, 1]])
    cache.reset()
    assert int(cache.length) == 0
    assert torch.equal(cache.update(keys[:, :, :2], values[:, :, :2])[1][:, :, :2], values[:, :, :2])


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize(
    "keys, values, words",
    [
        (rows(1), rows(2), ["values like keys", "[2, 3, 1, 4]", "[2, 3, 2, 4]"]),
        (rows(1), rows(1, dtype=torch.float64), ["values like keys", "torch.float32", "torch.float64"]),
        (rows(1)[:1], rows(1)[:1], ["[2, 3, positions, 4]", "[1, 3, 1, 4]"]),
        (rows(1)[:, :2], rows(1)[:, :2], ["[2, 3, positions, 4]", "[2, 2, 1, 4]"]),
        (rows(1)[..., :3], rows(1)[..., :3], ["[2, 3, positions, 4]", "[2, 3, 1, 3]"]),
        (rows(1)[0], rows(1)[0], ["positions", "[3, 1, 4]"]),
        (rows(1, dtype=torch.float64), rows(1, dtype=torch.float64), ["torch.float32", "torch.float64"]),
    ],
)
def test_bad_update(static: bool, keys: Tensor, values: Tensor, words: list[str]) -> None:
    cache = StaticKVCache(2, 3, 9, 4) if static else KVCache()
    cache.update(rows(2), rows(2))
    with pytest.raises(ValueError) as error:
        cache.update(keys, values)
    for word in words:
        assert word in str(error.value)
    assert int(cache.length) == 2


def test_bad_reorder_and_first_update() -> None:
    with pytest.raises(ValueError, match=r"indices of shape \[2\], got \[3\]"):
        StaticKVCache(2, 3, 9, 4).reorder(torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=r"\[batch, heads, positions, head_dim\], got \[3, 1, 4\]"):
        KVCache().update(rows(1)[0], rows(1)[0])
