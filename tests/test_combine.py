"""combine and its gradients against the reference."""

import pytest
import torch

import scattermoe
from tests.cases import DTYPES, EXPERT_COUNTS, LAYOUTS, ROUTINGS, Combine
from tests.checks import check

SUBSETS = [(), ("rows",), ("gates",), ("rows", "gates")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grouped", [False, True], ids=["scattered", "grouped"])
@pytest.mark.parametrize("gates", ["none", "same", "float32"])
@pytest.mark.parametrize("routing", ["uniform", "sentinels"])
def test_dtypes(device: str, dtype: torch.dtype, grouped: bool, gates: str, routing: str) -> None:
    if gates == "float32" and dtype == torch.float64:
        pytest.skip("gates coarser than the rows")
    kind = {"none": None, "same": dtype, "float32": torch.float32}[gates]
    check(Combine(grouped=grouped, dtype=dtype, gates=kind, routing=routing, device=device))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("grouped", [False, True], ids=["scattered", "grouped"])
def test_routings(device: str, routing: str, grouped: bool) -> None:
    check(Combine(grouped=grouped, routing=routing, device=device))
    check(Combine(grouped=grouped, routing=routing, gates=None, device=device))


@pytest.mark.parametrize("experts", EXPERT_COUNTS)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 8, 11])
def test_counts(device: str, experts: int, top_k: int) -> None:
    check(Combine(tokens=9, experts=experts, top_k=top_k, dtype=torch.bfloat16, gates=torch.float32, device=device))


@pytest.mark.parametrize("tokens", [0, 1, 2, 100])
@pytest.mark.parametrize("width", [1, 7, 33, 128, 1000])
def test_sizes(device: str, tokens: int, width: int) -> None:
    check(Combine(tokens=tokens, width=width, dtype=torch.float32, gates=torch.float32, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_memory_layouts(device: str, layout: str, grad_layout: str, dtype: torch.dtype) -> None:
    check(
        Combine(
            rows_layout=layout,
            gates_layout=layout if layout != "expanded" else "transposed",
            grad_layout=grad_layout,
            dtype=dtype,
            gates=dtype,
            routing="sentinels",
            device=device,
        )
    )


@pytest.mark.parametrize("grads", SUBSETS, ids=lambda s: "+".join(s) or "none")
@pytest.mark.parametrize("grouped", [False, True], ids=["scattered", "grouped"])
def test_subsets_of_gradients(device: str, grads: tuple[str, ...], grouped: bool) -> None:
    check(Combine(grads=grads, grouped=grouped, device=device))


def test_flat_ids(device: str) -> None:
    routing = scattermoe.route(torch.tensor([1, 0, 2, 0, -1], device=device), 3)
    rows = torch.randn(5, 4, device=device)
    torch.testing.assert_close(
        scattermoe.combine(rows, None, routing, grouped=False),
        rows * torch.tensor([[1.0], [1], [1], [1], [0]], device=device),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grouped", [False, True], ids=["scattered", "grouped"])
def test_nan_of_sentinels_stays_there(device: str, dtype: torch.dtype, grouped: bool) -> None:
    routing = scattermoe.route(torch.tensor([[0, -1], [3, 9], [1, 0]], device=device), 3)
    rows = torch.randn(6, 5, device=device, dtype=dtype)
    gates = torch.rand(3, 2, device=device, dtype=dtype)
    dead = [3, 4, 5] if grouped else [1, 2, 3]
    rows[dead] = float("nan")
    gates.view(-1)[[1, 2, 3]] = float("nan")
    rows.requires_grad_()
    gates.requires_grad_()
    y = scattermoe.combine(rows, gates, routing, grouped=grouped)
    assert bool((y[1] == 0).all())
    grad = torch.randn_like(y)
    grad[1] = float("nan")
    y.backward(grad)
    for tensor in (y, rows.grad, gates.grad):
        assert bool(tensor.isfinite().all())
    assert bool((rows.grad[dead] == 0).all())
    assert gates.grad.view(-1)[[1, 2, 3]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_nan_passes_through(device: str, dtype: torch.dtype) -> None:
    routing = scattermoe.route(torch.tensor([[0, 1], [1, 2], [2, 0]], device=device), 3)
    gates = torch.rand(3, 2, device=device, dtype=dtype)
    gates[1, 0] = float("nan")
    y = scattermoe.combine(torch.randn(6, 5, device=device, dtype=dtype), gates, routing)
    assert bool(y[1].isnan().all())
    assert bool(y[[0, 2]].isfinite().all())
    # A gate of zero does not hide a NaN row: 0 * NaN is NaN.
    rows = torch.full((6, 5), float("nan"), device=device, dtype=dtype)
    assert bool(scattermoe.combine(rows, torch.zeros(3, 2, device=device, dtype=dtype), routing).isnan().all())


def test_half_sums_in_float32(device: str) -> None:
    # 256 + 64 ones: in bfloat16 the ones vanish one by one.
    routing = scattermoe.route(torch.zeros(1, 65, dtype=torch.int64, device=device), 1)
    rows = torch.ones(65, 3, dtype=torch.bfloat16, device=device)
    rows[0] = 256
    assert scattermoe.combine(rows, None, routing).tolist() == [[320.0] * 3]
