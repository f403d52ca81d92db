"""parallel_linear and its gradients against the reference."""

import itertools

import pytest
import torch

import scattermoe
from tests.cases import DTYPES, EXPERT_COUNTS, ID_DTYPES, LAYOUTS, ROUTINGS, WEIGHT_LAYOUTS, Linear, make, make_ids
from tests.checks import check

ROWS = ("token", "slot", "grouped")
SUBSETS = [s for n in range(4) for s in itertools.combinations(("x", "weight", "bias"), n)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("grouped_out", [False, True], ids=["scattered_out", "grouped_out"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("weight_layout", ["contiguous", "transposed"])
def test_layouts(device: str, dtype: torch.dtype, rows: str, grouped_out: bool, bias: bool, weight_layout: str) -> None:
    check(
        Linear(
            rows=rows,
            grouped_out=grouped_out,
            bias=bias,
            dtype=dtype,
            weight_layout=weight_layout,
            routing="sentinels",
            device=device,
        )
    )


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_routings(device: str, routing: str, rows: str, dtype: torch.dtype) -> None:
    check(Linear(rows=rows, routing=routing, dtype=dtype, grouped_out=rows == "token", device=device))


# Enough slots for experts of 1 to 257 rows, on both sides of where tiles of rows end, and pairs of tiles, and their halves.
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("weight_layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("n_in, n_out", [(72, 136), (136, 264)])
def test_ends_of_tiles(device: str, rows: str, weight_layout: str, n_in: int, n_out: int) -> None:
    case = Linear(tokens=990, top_k=2, experts=15, n_in=n_in, n_out=n_out, rows=rows, weight_layout=weight_layout)
    for grouped_out in (False, True):
        ends = {"routing": "tile_ends", "grouped_out": grouped_out, "dtype": torch.bfloat16, "device": device}
        check(Linear(**(vars(case) | ends)))


@pytest.mark.parametrize("experts", EXPERT_COUNTS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_expert_counts(device: str, experts: int, top_k: int) -> None:
    check(Linear(tokens=40, top_k=top_k, experts=experts, n_in=9, n_out=7, dtype=torch.float32, device=device))


@pytest.mark.parametrize("top_k", [1, 2, 5, 6, 9])
def test_choices_per_token(device: str, top_k: int) -> None:
    # Up to every expert, and more choices than there are experts.
    check(Linear(top_k=top_k, experts=6, device=device))
    check(Linear(top_k=top_k, experts=6, rows="slot", dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_few_tokens(device: str, tokens: int, rows: str, dtype: torch.dtype) -> None:
    check(Linear(tokens=tokens, rows=rows, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_in, n_out", [(1, 1), (1, 33), (33, 1), (7, 13), (31, 65), (63, 5), (129, 127), (40, 300)])
def test_odd_sizes(device: str, dtype: torch.dtype, n_in: int, n_out: int) -> None:
    check(Linear(n_in=n_in, n_out=n_out, dtype=dtype, device=device))
    check(Linear(n_in=n_in, n_out=n_out, dtype=dtype, rows="grouped", weight_layout="transposed", device=device))


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_layouts(device: str, x_layout: str, grad_layout: str, dtype: torch.dtype) -> None:
    for rows, grouped_out in (("token", True), ("grouped", False)):
        check(
            Linear(
                rows=rows,
                grouped_out=grouped_out,
                x_layout=x_layout,
                grad_layout=grad_layout,
                dtype=dtype,
                routing="sentinels",
                device=device,
            )
        )


@pytest.mark.parametrize("weight_layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_weight_layouts(device: str, weight_layout: str, dtype: torch.dtype, rows: str) -> None:
    check(Linear(rows=rows, weight_layout=weight_layout, dtype=dtype, device=device))


@pytest.mark.parametrize("grads", SUBSETS, ids=lambda s: "+".join(s) or "none")
@pytest.mark.parametrize("rows", ROWS)
def test_subsets_of_gradients(device: str, grads: tuple[str, ...], rows: str) -> None:
    check(Linear(rows=rows, grads=grads, dtype=torch.float32, device=device))


@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=str)
def test_id_dtypes(device: str, id_dtype: torch.dtype) -> None:
    check(Linear(id_dtype=id_dtype, routing="sentinels", device=device))


def test_flat_ids(device: str) -> None:
    for rows in ROWS:
        check(Linear(top_k=1, flat_ids=True, rows=rows, device=device))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_many_rows_per_expert(device: str, dtype: torch.dtype, rows: str) -> None:
    check(
        Linear(
            tokens=300, top_k=2, experts=3, n_in=136, n_out=264, routing="skewed", rows=rows, dtype=dtype, device=device
        )
    )


@pytest.mark.parametrize("weight_layout", ["contiguous", "transposed"])
def test_gradient_of_a_weight_has_its_strides(device: str, weight_layout: str) -> None:
    weight = make((4, 6, 5), torch.float32, 0, 1.0, weight_layout).to(device).requires_grad_()
    routing = scattermoe.route(make_ids(7, 2, 4, "uniform", 0).to(device), 4)
    scattermoe.parallel_linear(torch.randn(7, 5, device=device), weight, routing).sum().backward()
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride()


def test_result_is_fresh_memory(device: str) -> None:
    x = torch.randn(6, 5, device=device)
    routing = scattermoe.route(torch.zeros(6, 1, dtype=torch.int64, device=device), 1)
    y = scattermoe.parallel_linear(x, torch.eye(5, device=device).unsqueeze(0), routing)
    assert y.is_contiguous()
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_gradients_accumulate(device: str) -> None:
    # Two uses of one weight, as when a layer is shared over depth.
    routing = scattermoe.route(make_ids(7, 2, 4, "uniform", 0).to(device), 4)
    weight = torch.randn(4, 5, 5, device=device, dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 5, device=device, dtype=torch.float64)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return scattermoe.combine(scattermoe.parallel_linear(x, weight, routing), None, routing, grouped=False)

    once = [torch.autograd.grad(layer(v).sum(), weight)[0] for v in (x, 2 * x)]
    (layer(x).sum() + layer(2 * x).sum()).backward()
    torch.testing.assert_close(weight.grad, once[0] + once[1])


class TestSentinels:
    """Ids outside [0, E): no contribution, zero gradient, and nothing behind them ever leaks."""

    IDS = ((0, -1), (3, 2), (-7, 99), (2, 0))
    SENTINEL_SLOTS = (1, 2, 4, 5)  # 3 is not in [0, 3) either

    def tensors(self, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        routing = scattermoe.route(torch.tensor(self.IDS, device=device), 3)
        weight = torch.randn(3, 5, 6, device=device, dtype=dtype)
        bias = torch.randn(3, 5, device=device, dtype=dtype)
        return routing, weight.requires_grad_(), bias.requires_grad_()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("rows", ROWS)
    @pytest.mark.parametrize("grouped_out", [False, True])
    def test_nan_behind_them_stays_there(self, device: str, dtype: torch.dtype, rows: str, grouped_out: bool) -> None:
        routing, weight, bias = self.tensors(device, dtype)
        nan = float("nan")
        x = torch.randn(4 if rows == "token" else 8, 6, device=device, dtype=dtype)
        if rows == "token":
            x[2] = nan  # both slots are sentinels
            dead = [2]
        elif rows == "slot":
            dead = list(self.SENTINEL_SLOTS)
            x[dead] = nan
        else:
            dead = [4, 5, 6, 7]
            x[dead] = nan
        x.requires_grad_()
        y = scattermoe.parallel_linear(
            x, weight, routing, bias=bias, grouped_in=rows == "grouped", grouped_out=grouped_out
        )
        dead_out = [4, 5, 6, 7] if grouped_out else list(self.SENTINEL_SLOTS)
        assert bool((y[dead_out] == 0).all())
        grad = torch.randn_like(y)
        grad[dead_out] = nan
        y.backward(grad)
        for tensor in (y, x.grad, weight.grad, bias.grad):
            assert bool(tensor.isfinite().all())
        assert bool((x.grad[dead] == 0).all())
        assert bool((weight.grad[1] == 0).all()) and bool((bias.grad[1] == 0).all())  # nobody chose expert 1

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_other_nan_passes_through(self, device: str, dtype: torch.dtype) -> None:
        routing, weight, bias = self.tensors(device, dtype)
        x = torch.randn(4, 6, device=device, dtype=dtype)
        x[0, 3] = float("nan")  # token 0: expert 0 and a sentinel
        x.requires_grad_()
        y = scattermoe.parallel_linear(x, weight, routing, bias=bias)
        assert bool(y[0].isnan().all())
        assert bool(y[1:].isfinite().all())
        y.backward(torch.ones_like(y))
        assert bool(weight.grad[0, :, 3].isnan().all())
        assert int(weight.grad.isnan().sum()) == 5
        assert bool(x.grad.isfinite().all())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_nan_weights_of_an_expert_nobody_chose(self, device: str, dtype: torch.dtype) -> None:
        routing, weight, bias = self.tensors(device, dtype)
        with torch.no_grad():
            weight[1] = float("nan")
            bias[1] = float("nan")
        x = torch.randn(4, 6, device=device, dtype=dtype, requires_grad=True)
        y = scattermoe.parallel_linear(x, weight, routing, bias=bias)
        y.sum().backward()
        for tensor in (y, x.grad, weight.grad, bias.grad):
            assert bool(tensor.isfinite().all())
