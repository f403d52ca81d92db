"""What the operators keep for backward, and what backward does not compute."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import scattermoe
from tests.cases import Mlp, make_ids, mlp_tensors, to_device
from tests.modes import Calls

NAMES = ("x", "w_up", "b_up", "w_down", "b_down", "gates")
CASE = Mlp(tokens=32, top_k=4, experts=6, hidden=40, width=24, dtype=torch.bfloat16, gates=torch.float32)
Z_BYTES = CASE.tokens * CASE.top_k * CASE.up_rows * 2


def saved_by(work: Any) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel():
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        work()
    return kept


def run(
    device: str, case: Mlp, wanted: tuple[str, ...]
) -> tuple[dict[str, Tensor | None], scattermoe.Routing, list[Tensor]]:
    tensors = {n: None if t is None else to_device(t, device) for n, t in mlp_tensors(case, 1).items()}
    for name in wanted:
        tensors[name].requires_grad_()
    routing = scattermoe.route(make_ids(case.tokens, case.top_k, case.experts, "sentinels", 1).to(device), case.experts)
    t = tensors
    kept = saved_by(
        lambda: scattermoe.moe_mlp(
            *(t["x"], t["w_up"], t["w_down"], t["gates"], routing),
            activation=case.activation,
            up_bias=t["b_up"],
            down_bias=t["b_down"],
        )
    )
    return tensors, routing, kept


def labels(tensors: dict[str, Tensor | None], routing: scattermoe.Routing, kept: list[Tensor]) -> list[str]:
    """The names of the saved tensors; a tensor that is none of the inputs is called by its size in bytes."""
    known = {t.data_ptr(): n for n, t in tensors.items() if t is not None}
    known |= {t.data_ptr(): n for n, t in routing._asdict().items()}
    return sorted(known.get(t.data_ptr(), str(t.untyped_storage().nbytes())) for t in kept)


ROUTING = ["expert_offsets", "slot_order", "slot_position"]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("biases", [(), ("b_up", "b_down")], ids=["no_bias", "bias"])
def test_moe_mlp_saves_x_z_gates_routing_and_weights(device: str, activation: str, biases: tuple[str, ...]) -> None:
    case = Mlp(**(vars(CASE) | {"activation": activation, "biases": biases}))
    wanted = tuple(n for n in NAMES if n in biases or not n.startswith("b_"))
    found = labels(*run(device, case, wanted))
    z = str(case.tokens * case.top_k * case.up_rows * 2)
    # The down bias is a parameter that the gates' gradient needs.
    allowed = sorted([z, "gates", "w_down", "w_up", "x", *ROUTING, *(["b_down"] if biases else [])])
    assert found == allowed


def test_x_is_not_kept_when_w_up_is_frozen(device: str) -> None:
    found = labels(*run(device, CASE, ("x", "gates")))
    assert "x" not in found
    assert sorted(set(found) - {"b_down"}) == sorted([str(Z_BYTES), "gates", "w_down", "w_up", *ROUTING])


@pytest.mark.parametrize("wanted", [("w_down",), ("gates",), ("b_down",)], ids="".join)
def test_x_is_not_kept_for_the_down_projection(device: str, wanted: tuple[str, ...]) -> None:
    assert "x" not in labels(*run(device, CASE, wanted))


def test_nothing_is_kept_without_gradients(device: str) -> None:
    assert run(device, CASE, ())[2] == []


def test_memory_held_by_the_graph(device: str) -> None:
    # The formula of the documentation: 2 T H + 4 T K I bytes for a gated MLP in bfloat16, beside routing and gates.
    tensors, _, kept = run(device, CASE, NAMES)
    parameters = {tensors[n].data_ptr() for n in ("w_up", "w_down", "b_down")}
    slots = CASE.tokens * CASE.top_k
    indices = 4 * (2 * slots + CASE.experts + 1)
    held = sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in parameters)
    assert held == 2 * CASE.tokens * CASE.hidden + 4 * slots * CASE.width + indices + 4 * slots


def test_parallel_linear_saves_its_inputs_only(device: str) -> None:
    routing = scattermoe.route(make_ids(8, 2, 3, "uniform", 0).to(device), 3)
    x = torch.randn(8, 5, device=device, requires_grad=True)
    weight = torch.randn(3, 4, 5, device=device, requires_grad=True)
    bias = torch.randn(3, 4, device=device, requires_grad=True)
    tensors = {"x": x, "weight": weight, "bias": bias}

    def kept() -> set[str]:
        return set(
            labels(tensors, routing, saved_by(lambda: scattermoe.parallel_linear(x, weight, routing, bias=bias)))
        )

    assert kept() <= {"x", "weight", "slot_order", "expert_offsets"}
    weight.requires_grad_(False)
    assert "x" not in kept()


def masks(y: Tensor) -> dict[str, list[bool]]:
    """The output mask with which each backward operator was called."""
    with Calls() as calls:
        y.sum().backward()
    found = {}
    for name, args in calls.seen:
        if "backward" in name:
            assert name not in found, f"{name} ran twice"
            found[name] = list(args[-1])
    return found


@pytest.mark.parametrize("wanted", [s for n in (1, 2, 6) for s in itertools.combinations(NAMES, n)], ids="+".join)
def test_moe_mlp_computes_only_what_is_asked_for(device: str, wanted: tuple[str, ...]) -> None:
    tensors = {n: to_device(t, device) for n, t in mlp_tensors(CASE, 1).items()}
    for name in wanted:
        tensors[name].requires_grad_()
    routing = scattermoe.route(make_ids(CASE.tokens, CASE.top_k, CASE.experts, "uniform", 1).to(device), CASE.experts)
    x, w_up, b_up, w_down, b_down, gates = tensors.values()
    y = scattermoe.moe_mlp(x, w_up, w_down, gates, routing, up_bias=b_up, down_bias=b_down)
    assert masks(y) == {"_moe_mlp_backward": [n in wanted for n in NAMES]}
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == (name in wanted)


@pytest.mark.parametrize(
    "wanted", [s for n in (1, 2, 3) for s in itertools.combinations(("x", "weight", "bias"), n)], ids="+".join
)
def test_parallel_linear_computes_only_what_is_asked_for(device: str, wanted: tuple[str, ...]) -> None:
    routing = scattermoe.route(make_ids(8, 2, 3, "uniform", 0).to(device), 3)
    tensors = {"x": (8, 5), "weight": (3, 4, 5), "bias": (3, 4)}
    x, weight, bias = (torch.randn(s, device=device, requires_grad=n in wanted) for n, s in tensors.items())
    y = scattermoe.parallel_linear(x, weight, routing, bias=bias)
    assert masks(y) == {"_parallel_linear_backward": [n in wanted for n in tensors]}


@pytest.mark.parametrize("wanted", [("rows",), ("gates",), ("rows", "gates")], ids="+".join)
def test_combine_computes_only_what_is_asked_for(device: str, wanted: tuple[str, ...]) -> None:
    routing = scattermoe.route(make_ids(8, 2, 3, "uniform", 0).to(device), 3)
    rows = torch.randn(16, 5, device=device, requires_grad="rows" in wanted)
    gates = torch.randn(8, 2, device=device, requires_grad="gates" in wanted)
    assert masks(scattermoe.combine(rows, gates, routing)) == {
        "_combine_backward": ["rows" in wanted, "gates" in wanted]
    }


def test_autograd_grad_of_some_computes_only_those(device: str) -> None:
    # Everything requires a gradient, one is asked for now.
    tensors = [to_device(t, device).requires_grad_() for t in mlp_tensors(CASE, 1).values()]
    routing = scattermoe.route(make_ids(CASE.tokens, CASE.top_k, CASE.experts, "uniform", 1).to(device), CASE.experts)
    x, w_up, b_up, w_down, b_down, gates = tensors
    y = scattermoe.moe_mlp(x, w_up, w_down, gates, routing, up_bias=b_up, down_bias=b_down)
    with Calls() as calls:
        torch.autograd.grad(y.sum(), [gates])
    (args,) = [args for name, args in calls.seen if name == "_moe_mlp_backward"]
    assert list(args[-1]) == [False] * 5 + [True]


def test_offloading_hooks(device: str) -> None:
    # Saved tensors may be moved and brought back: save_on_cpu, or any pack that returns something else.
    tensors = [to_device(t, device).requires_grad_() for t in mlp_tensors(CASE, 1).values()]
    routing = scattermoe.route(make_ids(CASE.tokens, CASE.top_k, CASE.experts, "uniform", 1).to(device), CASE.experts)
    x, w_up, b_up, w_down, b_down, gates = tensors

    def loss() -> Tensor:
        return (
            scattermoe.moe_mlp(x, w_up, w_down, gates, routing, up_bias=b_up, down_bias=b_down).float().square().sum()
        )

    expected = torch.autograd.grad(loss(), tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        copied = loss()
    with torch.autograd.graph.save_on_cpu():
        offloaded = loss()
    for found in (torch.autograd.grad(copied, tensors), torch.autograd.grad(offloaded, tensors)):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
