"""The reference and the measure against numbers worked out by hand."""

import math

import pytest
import torch

from tests import reference
from tests.cases import ROUTINGS, make_ids
from tests.tolerances import bound, row_error


def test_group_by_hand() -> None:
    order, position, offsets = reference.group(torch.tensor([[2, 0], [0, 7], [2, -1]]), 3)
    assert order == [1, 2, 0, 4, 3, 5]
    assert position == [2, 0, 1, 4, 3, 5]
    assert offsets == [0, 2, 2, 4]


def test_linear_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    weight = torch.tensor([[[1.0, 0.0]], [[0.0, 10.0]]], dtype=torch.float64)
    bias = torch.tensor([[0.5], [0.25]], dtype=torch.float64)
    ids = torch.tensor([[1, 0], [0, 5]])
    y = reference.parallel_linear(x, weight, bias, ids)
    assert y.flatten().tolist() == [20.25, 1.5, 3.5, 0.0]
    y = reference.parallel_linear(x, weight, bias, ids, grouped_out=True)
    assert y.flatten().tolist() == [1.5, 3.5, 20.25, 0.0]


def test_mlp_by_hand() -> None:
    x = torch.tensor([[2.0]], dtype=torch.float64)
    w_up = torch.tensor([[[1.0], [3.0]]], dtype=torch.float64)
    w_down = torch.tensor([[[0.5]]], dtype=torch.float64)
    gates = torch.tensor([[0.25, 100.0]], dtype=torch.float64)
    ids = torch.tensor([[0, -1]])
    y = reference.moe_mlp(x, w_up, None, w_down, None, gates, ids)
    assert y.item() == pytest.approx(0.25 * 0.5 * 6 * 2 / (1 + math.exp(-2)))
    y = reference.moe_mlp(x, w_up, None, w_down, None, gates, ids, glu_layout="up_gate")
    assert y.item() == pytest.approx(0.25 * 0.5 * 2 * 6 / (1 + math.exp(-6)))


def test_activations_match_torch() -> None:
    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    functional = torch.nn.functional
    torch.testing.assert_close(reference.activate(z, "silu"), functional.silu(z))
    torch.testing.assert_close(reference.activate(z, "gelu"), functional.gelu(z))
    torch.testing.assert_close(reference.activate(z, "gelu_tanh"), functional.gelu(z, approximate="tanh"))
    torch.testing.assert_close(reference.activate(z, "relu2"), functional.relu(z).square())
    pair = torch.tensor([9.0, -8.0], dtype=torch.float64)
    expected = (-7 + 1) * 7 / (1 + math.exp(-1.702 * 7))
    assert reference.activate(pair, "swiglu_clamped").item() == pytest.approx(expected)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_are_what_they_say(routing: str) -> None:
    ids = make_ids(50, 2, 4, routing, 0)
    inside = ids[(ids >= 0) & (ids < 4)]
    assert ids.shape == (50, 2)
    assert (len(inside) < 100) == ("sentinels" in routing)
    if routing == "all_sentinels":
        assert len(inside) == 0
    if routing == "one_expert":
        assert len(inside.unique()) == 1
    if routing == "repeated":
        assert bool((ids[:, 0] == ids[:, 1]).all())


def test_measure() -> None:
    ref = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    assert row_error(ref, ref) == 0
    assert row_error(ref + torch.tensor([[0.0, 0.5], [0.0, 0.0]]), ref) == pytest.approx(0.1)
    # A row that must be zero is not allowed to be small instead, and NaN is only right where it is expected.
    assert row_error(ref + torch.tensor([[0.0, 0.0], [1e-30, 0.0]]), ref) == math.inf
    assert row_error(ref * torch.tensor([[1.0], [math.nan]]), ref) == math.inf
    assert row_error(ref, ref * torch.tensor([[1.0], [math.nan]])) == math.inf


def test_bounds_are_tight_enough() -> None:
    # Rounding every partial sum to bfloat16 instead of float32 must not pass.
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = torch.zeros(64, dtype=torch.bfloat16)
    for column in values.t():
        total = total + column
    assert row_error(total.unsqueeze(1), values.double().sum(1, keepdim=True)) > bound(torch.bfloat16, 256, 1)
