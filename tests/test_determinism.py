"""The same input gives the same bits, with several threads, again and again."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import scattermoe
from tests.cases import Mlp, make, make_ids, mlp_tensors, to_device

pytestmark = pytest.mark.usefixtures("threads")

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
REPEATS = 3


def bitwise_equal(work: Callable[[], list[Tensor]]) -> None:
    first = work()
    for _ in range(REPEATS - 1):
        for a, b in zip(first, work(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("routing", ["uniform", "skewed", "one_expert", "repeated"])
def test_group_by_expert(device: str, routing: str) -> None:
    ids = make_ids(20_000, 3, 60, routing, 0).to(device)
    bitwise_equal(lambda: list(scattermoe.route(ids, 60)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ["token", "slot", "grouped"])
@pytest.mark.parametrize("routing", ["uniform", "one_expert"])
def test_parallel_linear(device: str, dtype: torch.dtype, rows: str, routing: str) -> None:
    indices = scattermoe.route(make_ids(1500, 2, 8, routing, 0).to(device), 8)
    x = make((1500 if rows == "token" else 3000, 64), dtype, 1).to(device).requires_grad_()
    weight = make((8, 96, 64), dtype, 2).to(device).requires_grad_()
    bias = make((8, 96), dtype, 3).to(device).requires_grad_()
    grad = make((3000, 96), dtype, 4).to(device)

    def work() -> list[Tensor]:
        y = scattermoe.parallel_linear(x, weight, indices, bias=bias, grouped_in=rows == "grouped")
        return [y, *torch.autograd.grad(y, [x, weight, bias], grad)]

    bitwise_equal(work)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_combine(device: str, dtype: torch.dtype, grouped: bool) -> None:
    indices = scattermoe.route(make_ids(1500, 4, 8, "sentinels", 0).to(device), 8)
    rows = make((6000, 64), dtype, 1).to(device).requires_grad_()
    gates = make((1500, 4), dtype, 2).to(device).requires_grad_()
    grad = make((1500, 64), dtype, 3).to(device)

    def work() -> list[Tensor]:
        y = scattermoe.combine(rows, gates, indices, grouped=grouped)
        return [y, *torch.autograd.grad(y, [rows, gates], grad)]

    bitwise_equal(work)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ["uniform", "skewed", "sentinels"])
def test_moe_mlp(device: str, dtype: torch.dtype, routing: str) -> None:
    case = Mlp(tokens=900, top_k=2, experts=8, hidden=64, width=48, dtype=dtype)
    tensors = [to_device(t, device).requires_grad_() for t in mlp_tensors(case, 1).values()]
    indices = scattermoe.route(make_ids(900, 2, 8, routing, 0).to(device), 8)
    x, w_up, b_up, w_down, b_down, gates = tensors
    grad = make((900, 64), dtype, 3).to(device)

    def work() -> list[Tensor]:
        y = scattermoe.moe_mlp(x, w_up, w_down, gates, indices, up_bias=b_up, down_bias=b_down)
        return [y, *torch.autograd.grad(y, tensors, grad)]

    bitwise_equal(work)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_gating(device: str, dtype: torch.dtype) -> None:
    logits = make((3000, 64), dtype, 1).to(device).requires_grad_()

    def work() -> list[Tensor]:
        gates, ids = scattermoe.topk_gating(logits, 6, normalize=True)
        return [gates, ids, torch.autograd.grad(gates.square().sum(), logits)[0]]

    bitwise_equal(work)


def test_deterministic_mode_has_no_objection(device: str) -> None:
    case = Mlp(dtype=torch.float32)
    tensors = [to_device(t, device).requires_grad_() for t in mlp_tensors(case, 1).values()]
    torch.use_deterministic_algorithms(True)
    try:
        indices = scattermoe.route(make_ids(11, 2, 5, "sentinels", 0).to(device), 5)
        x, w_up, b_up, w_down, b_down, gates = tensors
        scattermoe.moe_mlp(x, w_up, w_down, gates, indices, up_bias=b_up, down_bias=b_down).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_rows_do_not_depend_on_their_neighbours(device: str) -> None:
    # Every token is computed on its own: permuting the tokens permutes the result (to rounding: the groups' sizes may
    # choose another kernel).
    case = Mlp(tokens=50, dtype=torch.float64)
    x, w_up, b_up, w_down, b_down, gates = (to_device(t, device) for t in mlp_tensors(case, 1).values())
    ids = make_ids(50, 2, 5, "sentinels", 0).to(device)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).to(device)

    def run(x: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
        return scattermoe.moe_mlp(x, w_up, w_down, gates, scattermoe.route(ids, 5), up_bias=b_up, down_bias=b_down)

    torch.testing.assert_close(run(x, gates, ids)[order], run(x[order], gates[order], ids[order]))
    torch.testing.assert_close(run(x, gates, ids)[:7], run(x[:7], gates[:7], ids[:7]))
