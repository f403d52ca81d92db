"""moe_mlp(recompute=True): the same numbers while keeping x and not the pre-activations."""

from __future__ import annotations

import pytest
import torch

import scattermoe
from tests.cases import Mlp, make_ids, mlp_tensors, to_device
from tests.test_saved_state import NAMES, ROUTING, labels, saved_by

CASE = Mlp(experts=5, tokens=12, top_k=3, hidden=16, width=8, n_out=10, biases=("b_up", "b_down"), dtype=torch.bfloat16)


def run(device: str, wanted: tuple[str, ...], recompute: bool):
    tensors = {name: to_device(t, device) for name, t in mlp_tensors(CASE, 1).items()}
    for name in wanted:
        tensors[name].requires_grad_()
    ids = make_ids(CASE.tokens, CASE.top_k, CASE.experts, "sentinels", 1).to(device)
    routing = scattermoe.route(ids, CASE.experts)
    outputs = []

    def call() -> torch.Tensor:
        outputs.append(
            scattermoe.moe_mlp(
                *(tensors["x"], tensors["w_up"], tensors["w_down"], tensors["gates"], routing),
                up_bias=tensors["b_up"],
                down_bias=tensors["b_down"],
                recompute=recompute,
            )
        )
        return outputs[-1]

    kept = saved_by(call)
    return tensors, routing, kept, outputs[0]


@pytest.mark.parametrize("wanted", [NAMES, ("x",), ("w_up", "b_up"), ("gates", "w_down")], ids="+".join)
def test_same_output_and_gradients(device: str, wanted: tuple[str, ...]) -> None:
    results = []
    for recompute in (False, True):
        tensors, _, _, y = run(device, wanted, recompute)
        grads = torch.autograd.grad(y, [tensors[name] for name in wanted], torch.ones_like(y))
        results.append((y, *grads))
    for kept, again in zip(*results, strict=True):
        torch.testing.assert_close(again, kept, rtol=2e-2, atol=2e-2)


def test_saves_x_and_not_z(device: str) -> None:
    tensors, routing, kept, _ = run(device, NAMES, recompute=True)
    assert labels(tensors, routing, kept) == sorted(["b_down", "b_up", "gates", "w_down", "w_up", "x", *ROUTING])


def test_gradcheck() -> None:
    case = Mlp(**(vars(CASE) | {"dtype": torch.float64}))
    tensors = mlp_tensors(case, 2)
    routing = scattermoe.route(make_ids(case.tokens, case.top_k, case.experts, "sentinels", 2), case.experts)

    def f(x, w_up, b_up, w_down, b_down, gates):
        return scattermoe.moe_mlp(x, w_up, w_down, gates, routing, up_bias=b_up, down_bias=b_down, recompute=True)

    inputs = tuple(
        tensors[name].double().requires_grad_() for name in ("x", "w_up", "b_up", "w_down", "b_down", "gates")
    )
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


def test_compiles(device: str) -> None:
    tensors, routing, _, _ = run(device, (), recompute=True)
    x = tensors["x"].requires_grad_()

    def f(x):
        return scattermoe.moe_mlp(x, tensors["w_up"], tensors["w_down"], tensors["gates"], routing, recompute=True)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(f(x).sum(), x)
    (got,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(got, expected)
