"""torch.compile(fullgraph=True) with any number of tokens, and torch.export, equal eager."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import scattermoe
from tests.cases import Mlp, make, make_ids, mlp_tensors, to_device

pytestmark = pytest.mark.usefixtures("fresh_compiler")

EXPERTS, TOP_K, HIDDEN, WIDTH = 5, 2, 12, 8
TOKENS = (17, 64, 333, 4096)

LayerFunction = Callable[..., Tensor]


def parameters(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    case = Mlp(tokens=1, top_k=TOP_K, experts=EXPERTS, hidden=HIDDEN, width=WIDTH, dtype=dtype)
    names = ("w_up", "b_up", "w_down", "b_down")
    tensors = mlp_tensors(case, 1)
    found = {n: to_device(tensors[n], device).requires_grad_() for n in names}
    found["router"] = to_device(make((EXPERTS, HIDDEN), dtype, 2, 0.5), device).requires_grad_()
    return found


def mlp_layer(x: Tensor, ids: Tensor, gates: Tensor, p: dict[str, Tensor]) -> Tensor:
    routing = scattermoe.route(ids, EXPERTS)
    return scattermoe.moe_mlp(x, p["w_up"], p["w_down"], gates, routing, up_bias=p["b_up"], down_bias=p["b_down"])


def linear_layer(x: Tensor, ids: Tensor, gates: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Every layout of parallel_linear once, and both combines."""
    routing = scattermoe.route(ids, EXPERTS)
    z = scattermoe.parallel_linear(x, p["w_up"], routing, bias=p["b_up"], grouped_out=True)
    gate, up = z.chunk(2, dim=1)
    rows = scattermoe.parallel_linear(torch.tanh(gate) * up, p["w_down"], routing, grouped_in=True, grouped_out=True)
    more = scattermoe.parallel_linear(torch.tanh(gate), p["w_down"], routing, bias=p["b_down"], grouped_in=True)
    again = scattermoe.parallel_linear(more, p["w_up"], routing)[:, :HIDDEN]
    return scattermoe.combine(rows, gates, routing) + scattermoe.combine(again, None, routing, grouped=False)


def whole_layer(x: Tensor, ids: Tensor, gates: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Router, top-k and experts: what a model compiles."""
    gates, ids = scattermoe.topk_gating(x @ p["router"].t(), TOP_K, normalize=True)
    return mlp_layer(x, ids, gates, p)


LAYERS = {"mlp": mlp_layer, "linear": linear_layer, "whole": whole_layer}


def inputs(tokens: int, device: str, routing: str = "uniform", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = to_device(make((tokens, HIDDEN), dtype, tokens), device).requires_grad_()
    gates = to_device(make((tokens, TOP_K), dtype, tokens + 1), device).requires_grad_()
    return [x, make_ids(tokens, TOP_K, EXPERTS, routing, tokens).to(device), gates]


def forward_and_gradients(layer: LayerFunction, args: list[Tensor], p: dict[str, Tensor]) -> list[Tensor]:
    y = layer(*args, p)
    wanted = [args[0], args[2], *p.values()]
    grads = torch.autograd.grad(
        y, wanted, torch.linspace(-1, 1, y.numel(), device=y.device).to(y.dtype).view_as(y), allow_unused=True
    )
    return [y, *(g for g in grads if g is not None)]


# Inductor generates and compiles C++ here, which takes a while: once for a whole layer, where everything meets.
@pytest.mark.parametrize(
    "layer, dynamic, backend",
    [(layer, dynamic, "aot_eager") for layer in LAYERS for dynamic in ("dynamic=True", "mark_dynamic")]
    + [pytest.param("whole", "mark_dynamic", "inductor", marks=pytest.mark.slow)],
)
def test_one_graph_for_every_number_of_tokens(device: str, layer: str, dynamic: str, backend: str) -> None:
    p = parameters(device)
    compiled = torch.compile(
        LAYERS[layer], fullgraph=True, backend=backend, dynamic=True if dynamic == "dynamic=True" else None
    )
    for count, tokens in enumerate(TOKENS):
        args = inputs(tokens, device, "sentinels" if tokens == 333 else "uniform")
        if dynamic == "mark_dynamic":
            for tensor in args:
                torch._dynamo.mark_dynamic(tensor, 0)
        with torch._dynamo.config.patch(error_on_recompile=count > 0):
            found = forward_and_gradients(compiled, args, p)
        for a, b in zip(found, forward_and_gradients(LAYERS[layer], args, p), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_and_one_token(device: str, layer: str, tokens: int) -> None:
    p = parameters(device)
    compiled = torch.compile(LAYERS[layer], fullgraph=True, backend="aot_eager", dynamic=True)
    args = inputs(tokens, device)
    found, expected = (forward_and_gradients(f, args, p) for f in (compiled, LAYERS[layer]))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layer", ["mlp", "linear"])
@pytest.mark.parametrize("frozen", ["x", "weights"])
def test_frozen_inputs(device: str, layer: str, frozen: str) -> None:
    p, args = parameters(device), inputs(20, device)
    for tensor in [args[0]] if frozen == "x" else p.values():
        tensor.requires_grad_(False)
    wanted = [t for t in (args[0], args[2], *p.values()) if t.requires_grad]
    compiled = torch.compile(LAYERS[layer], fullgraph=True, backend="aot_eager")
    found, expected = (
        torch.autograd.grad(f(*args, p).sum(), wanted, allow_unused=True) for f in (compiled, LAYERS[layer])
    )
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_transposed_weights_stay_views(device: str) -> None:
    p, args = parameters(device), inputs(20, device)
    stored = p["w_up"].detach().transpose(1, 2).contiguous().requires_grad_()

    def layer(x: Tensor, ids: Tensor, gates: Tensor, p: dict[str, Tensor]) -> Tensor:
        return mlp_layer(x, ids, gates, p | {"w_up": stored.transpose(1, 2)})

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(*args, p).sum(), [stored, args[0]]) for f in (compiled, layer))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


def test_routing_crosses_the_boundary_of_a_graph(device: str) -> None:
    # A Routing is a NamedTuple of tensors: it goes in and comes out.
    p, (x, ids, gates) = parameters(device), inputs(20, device)
    routing = torch.compile(scattermoe.route, fullgraph=True, backend="aot_eager", dynamic=True)(ids, EXPERTS)
    assert isinstance(routing, scattermoe.Routing)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def rest(x: Tensor, gates: Tensor, routing: scattermoe.Routing) -> Tensor:
        return scattermoe.moe_mlp(x, p["w_up"], p["w_down"], gates, routing)

    torch.testing.assert_close(rest(x, gates, routing), scattermoe.moe_mlp(x, p["w_up"], p["w_down"], gates, routing))


def test_inside_a_compiled_training_step_with_autocast(device: str) -> None:
    p, args = parameters(device), inputs(20, device)

    def step(x: Tensor, ids: Tensor, gates: Tensor, p: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return whole_layer(x, ids, gates, p)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (forward_and_gradients(f, args, p) for f in (compiled, step))
    assert found[0].dtype == torch.bfloat16
    for a, b in zip(found, expected, strict=True):
        # Eager autocast casts a parameter once and sums the gradients of its uses in bfloat16, the traced graph in float32.
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * float(b.detach().abs().max()))


class Layer(torch.nn.Module):
    def __init__(self, device: str, layer: str) -> None:
        super().__init__()
        self.layer = layer
        self.p = torch.nn.ParameterDict(parameters(device))

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return LAYERS[self.layer](x, ids, gates, dict(self.p.items()))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("strict", [False, True])
def test_export(device: str, layer: str, strict: bool) -> None:
    module = Layer(device, layer)
    tokens = torch.export.Dim("tokens", min=2, max=1 << 20)
    shapes = {"x": {0: tokens}, "ids": {0: tokens}, "gates": {0: tokens}}
    args = tuple(t.detach() for t in inputs(20, device))
    program = torch.export.export(module, args, dynamic_shapes=shapes, strict=strict)
    for n in (2, 17, 500):
        args = tuple(t.detach() for t in inputs(n, device))
        torch.testing.assert_close(program.module()(*args), module(*args))


def test_export_survives_a_round_trip(device: str, tmp_path) -> None:
    module = Layer(device, "whole")
    args = tuple(t.detach() for t in inputs(20, device))
    torch.export.save(torch.export.export(module, args), tmp_path / "layer.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "layer.pt2").module()(*args), module(*args))
