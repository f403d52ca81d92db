"""What the operators keep for backward, and what backward does not compute."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import scattermoe
from tests.cases import Mlp, make_ids, mlp_tensors, to_device
from tests.modes import Calls, Outputs

NAMES = ("x", "w_up", "b_up", "w_down", "b_down", "gates")
CASE = Mlp(tokens=32, top_k=4, experts=6, hidden=40, width=24, dtype=torch.bfloat16, gates=torch.float32)
Z_BYTES = CASE.tokens * CASE.top_k * CASE.up_rows * 2


def saved_by(work: Any) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel():
            kept.append(tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
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


BACKWARDS = ("_moe_mlp_backward", "_moe_mlp_backward_over_z")
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
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        copied = loss()
    with save_on_cpu():
        offloaded = loss()
    for found in (torch.autograd.grad(copied, tensors), torch.autograd.grad(offloaded, tensors)):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


class TestBackwardWritesOverZ:
    """Backward takes the memory of the pre-activations for their gradient, but only where nobody can read them again."""

    def layer(self, device: str, **options: Any) -> tuple[Any, list[Tensor]]:
        tensors = [to_device(t, device).requires_grad_() for t in mlp_tensors(CASE, 1).values()]
        ids = make_ids(CASE.tokens, CASE.top_k, CASE.experts, "sentinels", 1).to(device)
        routing = scattermoe.route(ids, CASE.experts)

        def forward(x, w_up, b_up, w_down, b_down, gates) -> Tensor:
            return scattermoe.moe_mlp(x, w_up, w_down, gates, routing, up_bias=b_up, down_bias=b_down, **options)

        return forward, tensors

    def gradients(self, y: Tensor, tensors: list[Tensor], **options: Any) -> tuple[tuple[Tensor, ...], bool]:
        """Of the sum of squares, and whether they were written over z."""
        loss = y.float().square().sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = torch.autograd.grad(loss, tensors, **options)
        ran = {event.name for event in profile.events()} & {f"scattermoe::{op}" for op in BACKWARDS}
        assert len(ran) == 1
        return found, ran == {f"scattermoe::{BACKWARDS[1]}"}

    def test_in_a_plain_step(self, device: str) -> None:
        forward, tensors = self.layer(device)
        assert self.gradients(forward(*tensors), tensors)[1]

    def test_a_graph_that_is_kept_keeps_z(self, device: str) -> None:
        forward, tensors = self.layer(device)
        y = forward(*tensors)
        first, over_first = self.gradients(y, tensors, retain_graph=True)
        again, over_again = self.gradients(y, tensors, create_graph=True)
        last, over_last = self.gradients(y, tensors)
        assert (over_first, over_again, over_last) == (False, False, True)
        for gradients in (again, last):
            for a, b in zip(first, gradients, strict=True):
                assert torch.equal(a, b)

    def test_recomputed_z_is_always_free(self, device: str) -> None:
        forward, tensors = self.layer(device, recompute=True)
        y = forward(*tensors)
        first, over_first = self.gradients(y, tensors, retain_graph=True)
        last, over_last = self.gradients(y, tensors)
        assert over_first and over_last
        for a, b in zip(first, last, strict=True):
            assert torch.equal(a, b)

    def test_what_a_hook_holds_stays(self, device: str) -> None:
        # The plainest hooks hand out the very tensor that was packed, which their owner may go on reading.
        forward, tensors = self.layer(device)
        kept: list[Tensor] = []
        with saved_tensors_hooks(lambda t: kept.append(t) or len(kept) - 1, lambda i: kept[i]):
            y = forward(*tensors)
        before = [t.clone() for t in kept]
        assert not self.gradients(y, tensors)[1]
        for a, b in zip(kept, before, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("where", ["checkpoint", "save_on_cpu"])
    def test_same_gradients_under_hooks(self, device: str, where: str) -> None:
        forward, tensors = self.layer(device)
        expected, _ = self.gradients(forward(*tensors), tensors)
        if where == "checkpoint":
            y = checkpoint(forward, *tensors, use_reentrant=False)
        else:
            with save_on_cpu():
                y = forward(*tensors)
        for a, b in zip(self.gradients(y, tensors)[0], expected, strict=True):
            assert torch.equal(a, b)

    def test_what_a_dispatch_mode_holds_stays(self, device: str) -> None:
        forward, tensors = self.layer(device)
        with Outputs() as mode:
            y = forward(*tensors)
        (z,) = (t for t in mode.seen if t.untyped_storage().nbytes() == Z_BYTES)
        before = z.clone()
        assert not self.gradients(y, tensors)[1]
        assert torch.equal(z, before)

    def test_not_in_a_trace(self, device: str) -> None:
        forward, tensors = self.layer(device)
        graph = torch.fx.experimental.proxy_tensor.make_fx(
            lambda *t: torch.autograd.grad(forward(*t).float().sum(), t)
        )(*tensors)
        ran = {node.target for node in graph.graph.nodes if node.op == "call_function"}
        assert torch.ops.scattermoe._moe_mlp_backward.default in ran
        assert torch.ops.scattermoe._moe_mlp_backward_over_z.default not in ran

    def test_trying_again_after_an_error_says_why_it_cannot(self) -> None:
        # Offsets are read on the host here. Changed behind autograd's back, they make backward fail halfway.
        tensors = [t.requires_grad_() for t in mlp_tensors(CASE, 1).values()]
        x, w_up, b_up, w_down, b_down, gates = tensors
        routing = scattermoe.route(make_ids(CASE.tokens, CASE.top_k, CASE.experts, "uniform", 1), CASE.experts)
        y = scattermoe.moe_mlp(x, w_up, w_down, gates, routing, up_bias=b_up, down_bias=b_down)
        right = routing.expert_offsets.clone()
        routing.expert_offsets.data.fill_(-1)
        with pytest.raises(IndexError, match="expert_offsets"):
            torch.autograd.grad(y.sum(), tensors)
        routing.expert_offsets.data.copy_(right)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), tensors)
