"""moe_mlp and its gradients against the reference."""

import itertools

import pytest
import torch

import scattermoe
from tests import reference
from tests.cases import (
    DTYPES,
    EXPERT_COUNTS,
    LAYOUTS,
    ROUTINGS,
    WEIGHT_LAYOUTS,
    Mlp,
    make_ids,
    mlp_tensors,
    seed_of,
    to_device,
)
from tests.checks import check
from tests.tolerances import ROUNDINGS, assert_close, roundoff

INPUTS = ("x", "w_up", "b_up", "w_down", "b_down", "gates")
ACTIVATION_LAYOUTS = [(a, g) for a in reference.GATED for g in reference.GLU_LAYOUTS] + [
    (a, "gate_up") for a in reference.PLAIN
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation, glu_layout", ACTIVATION_LAYOUTS)
def test_activations(device: str, dtype: torch.dtype, activation: str, glu_layout: str) -> None:
    check(Mlp(activation=activation, glu_layout=glu_layout, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "biases", [(), ("b_up",), ("b_down",), ("b_up", "b_down")], ids=lambda b: "+".join(b) or "none"
)
@pytest.mark.parametrize("weight_layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("gates", ["same", "float32"])
def test_dtypes(device: str, dtype: torch.dtype, biases: tuple[str, ...], weight_layout: str, gates: str) -> None:
    check(
        Mlp(
            dtype=dtype,
            gates=None if gates == "same" else torch.float32,
            biases=biases,
            weight_layout=weight_layout,
            routing="sentinels",
            device=device,
        )
    )


# Experts of 1 to 257 rows: both sides of where tiles of rows end, and pairs of tiles, and their halves.
@pytest.mark.parametrize("hidden, width", [(72, 136), (264, 72)])
@pytest.mark.parametrize("glu_layout", ["gate_up", "interleaved"])
def test_ends_of_tiles(device: str, hidden: int, width: int, glu_layout: str) -> None:
    sizes = {"tokens": 990, "top_k": 2, "experts": 15, "hidden": hidden, "width": width, "glu_layout": glu_layout}
    check(Mlp(**sizes, routing="tile_ends", dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_routings(device: str, routing: str, dtype: torch.dtype, activation: str) -> None:
    check(Mlp(routing=routing, dtype=dtype, activation=activation, device=device))


@pytest.mark.parametrize("experts", EXPERT_COUNTS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_expert_counts(device: str, experts: int, top_k: int) -> None:
    check(Mlp(tokens=40, top_k=top_k, experts=experts, hidden=9, width=5, dtype=torch.float32, device=device))


@pytest.mark.parametrize("top_k", [1, 2, 5, 6, 9])
def test_choices_per_token(device: str, top_k: int) -> None:
    check(Mlp(top_k=top_k, experts=6, device=device))
    check(Mlp(top_k=top_k, experts=6, dtype=torch.bfloat16, gates=torch.float32, device=device))


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ["uniform", "all_sentinels"])
def test_few_tokens(device: str, tokens: int, dtype: torch.dtype, routing: str) -> None:
    check(Mlp(tokens=tokens, dtype=dtype, routing=routing, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "hidden, width, n_out", [(1, 1, 1), (1, 33, 2), (33, 1, 33), (7, 13, 5), (63, 65, 31), (129, 40, 127)]
)
def test_odd_sizes(device: str, dtype: torch.dtype, hidden: int, width: int, n_out: int) -> None:
    check(Mlp(hidden=hidden, width=width, n_out=n_out, dtype=dtype, device=device))
    check(Mlp(hidden=hidden, width=width, n_out=n_out, activation="silu", dtype=dtype, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_layouts(device: str, layout: str, grad_layout: str, dtype: torch.dtype) -> None:
    check(
        Mlp(
            x_layout=layout,
            gates_layout=layout if layout != "expanded" else "transposed",
            grad_layout=grad_layout,
            dtype=dtype,
            routing="sentinels",
            device=device,
        )
    )


@pytest.mark.parametrize("weight_layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("glu_layout", reference.GLU_LAYOUTS)
def test_weight_layouts(device: str, weight_layout: str, dtype: torch.dtype, glu_layout: str) -> None:
    check(Mlp(weight_layout=weight_layout, glu_layout=glu_layout, dtype=dtype, device=device))


@pytest.mark.parametrize(
    "grads", [s for n in range(7) for s in itertools.combinations(INPUTS, n)], ids=lambda s: "+".join(s) or "none"
)
def test_subsets_of_gradients(device: str, grads: tuple[str, ...]) -> None:
    check(Mlp(grads=grads, dtype=torch.float32, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_are_accurate_everywhere(device: str, dtype: torch.dtype, activation: str) -> None:
    # One expert that hands x to the activation as it is (as the gate, beside an up of 1): a few units in the last place, far
    # from zero too, where 1 - sigmoid and 1 + tanh cancel.
    gated = activation in reference.GATED
    points = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([-80.0, -20.0, 20.0, 80.0])]).to(dtype)
    x = points.unsqueeze(1).to(device).requires_grad_()
    w_up = torch.tensor([[[1.0], [0.0]] if gated else [[1.0]]], dtype=dtype, device=device)
    b_up = torch.tensor([[0.0, 1.0] if gated else [0.0]], dtype=dtype, device=device)
    one = torch.ones(1, 1, 1, dtype=dtype, device=device)
    routing = scattermoe.route(torch.zeros(len(points), dtype=torch.int64, device=device), 1)
    y = scattermoe.moe_mlp(x, w_up, one, torch.ones_like(x), routing, activation=activation, up_bias=b_up)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    leaf = reference.leaf(points)
    up = torch.ones(1, dtype=torch.float64)
    expected = torch.cat([reference.activate(torch.cat([v, up]) if gated else v, activation) for v in leaf.split(1)])
    (correct,) = torch.autograd.grad(expected.sum(), leaf)
    away = (points != 0) & (points.abs() != 7) if activation in reference.KINKED else points == points
    for name, found, right in (("value", y, expected), ("derivative", grad, correct)):
        error = (found.detach().flatten().cpu().double() - right.detach()).abs() / right.detach().abs().clamp_min(1)
        worst = int(error.where(away, 0).argmax())
        assert error[worst] <= 8 * roundoff(dtype), (
            f"{name} at {float(points[worst])}: off by {float(error[worst]):.3g}"
        )


@pytest.mark.parametrize("limit", [0.5, 1.0, 7.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamp_limits(device: str, limit: float, dtype: torch.dtype) -> None:
    check(Mlp(activation="swiglu_clamped", glu_layout="interleaved", limit=limit, dtype=dtype, device=device))


def test_alpha(device: str) -> None:
    case = Mlp(activation="swiglu_clamped")
    tensors = mlp_tensors(case, 5)
    ids = make_ids(case.tokens, case.top_k, case.experts, "uniform", 5)
    inputs = {n: to_device(t, device).requires_grad_() for n, t in tensors.items()}
    x, w_up, b_up, w_down, b_down, gates = inputs.values()
    options = {"activation": "swiglu_clamped", "alpha": 0.75, "limit": 1.5}
    y = scattermoe.moe_mlp(
        x,
        w_up,
        w_down,
        gates,
        scattermoe.route(ids.to(device), case.experts),
        up_bias=b_up,
        down_bias=b_down,
        **options,
    )
    leaves = {n: reference.leaf(t) for n, t in tensors.items()}
    expected = reference.moe_mlp(*leaves.values(), ids, **options)
    assert_close("y", y, expected, 100, 5)
    grads = torch.autograd.grad(y.sum(), list(inputs.values()))
    for name, a, b in zip(
        INPUTS, grads, reference.gradients(expected, list(leaves.values()), torch.ones_like(expected)), strict=True
    ):
        assert_close(name, a, b, 100, 5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "reglu", "relu2"])
def test_many_rows_per_expert(device: str, dtype: torch.dtype, activation: str) -> None:
    check(
        Mlp(
            tokens=300,
            experts=3,
            hidden=136,
            width=72,
            routing="skewed",
            activation=activation,
            dtype=dtype,
            device=device,
        )
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ["uniform", "sentinels"])
def test_pre_activations(device: str, dtype: torch.dtype, routing: str) -> None:
    case = Mlp(dtype=dtype, routing=routing)
    seed = seed_of(case)
    ids = make_ids(case.tokens, case.top_k, case.experts, routing, seed)
    tensors = mlp_tensors(case, seed)
    x, w_up, b_up, w_down, b_down, gates = (to_device(t, device) for t in tensors.values())
    indices = scattermoe.route(ids.to(device), case.experts)
    y, z = torch.ops.scattermoe._moe_mlp_forward(
        x, w_up, b_up, w_down, b_down, gates, *indices, "swiglu", "gate_up", 1.702, 7.0, None
    )
    doubles = {n: t.double() for n, t in tensors.items()}
    expected = reference.parallel_linear(doubles["x"], doubles["w_up"], doubles["b_up"], ids, grouped_out=True)
    assert_close("z", z, expected, case.hidden + 1, ROUNDINGS["moe_mlp"]["z"])
    # The saving forward and the plain one are one computation.
    plain = torch.ops.scattermoe.moe_mlp(x, w_up, b_up, w_down, b_down, gates, *indices)
    assert torch.equal(y, plain)


@pytest.mark.parametrize(
    "mask", list(itertools.product([False, True], repeat=6)), ids=lambda m: "".join(str(int(b)) for b in m)
)
def test_backward_op_returns_what_the_mask_says(device: str, mask: tuple[bool, ...]) -> None:
    case = Mlp(dtype=torch.float32, gates=torch.float32)
    x, w_up, b_up, w_down, b_down, gates = (to_device(t, device) for t in mlp_tensors(case, 3).values())
    indices = scattermoe.route(make_ids(case.tokens, case.top_k, case.experts, "sentinels", 3).to(device), case.experts)
    settings = ("swiglu", "gate_up", 1.702, 7.0, None)
    y, z = torch.ops.scattermoe._moe_mlp_forward(x, w_up, b_up, w_down, b_down, gates, *indices, *settings)
    grad = torch.randn(y.shape, device=device)
    backward = torch.ops.scattermoe._moe_mlp_backward
    everything = backward(grad, x, w_up, w_down, b_down, gates, z, *indices, *settings, [True] * 6)
    found = backward(grad, x, w_up, w_down, b_down, gates, z, *indices, *settings, list(mask))
    for wanted, one, full in zip(mask, found, everything, strict=True):
        assert one.shape == (full.shape if wanted else (0,))
        assert not wanted or torch.equal(one, full)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_nan_of_sentinels_stays_there(device: str, dtype: torch.dtype, activation: str) -> None:
    case = Mlp(tokens=4, experts=3, hidden=6, width=4, activation=activation, dtype=dtype)
    tensors = {n: to_device(t, device) for n, t in mlp_tensors(case, 1).items()}
    routing = scattermoe.route(torch.tensor([[0, -1], [3, 2], [-7, 99], [2, 0]], device=device), 3)
    tensors["x"][2] = float("nan")
    tensors["gates"].view(-1)[[1, 2, 4, 5]] = float("nan")
    # Nor may the parameters of an expert nobody chose.
    for name in ("w_up", "b_up", "w_down", "b_down"):
        tensors[name][1] = float("nan")
    x, w_up, b_up, w_down, b_down, gates = (t.requires_grad_() for t in tensors.values())
    y = scattermoe.moe_mlp(x, w_up, w_down, gates, routing, activation=activation, up_bias=b_up, down_bias=b_down)
    assert bool((y[2] == 0).all())
    grad = torch.randn_like(y)
    grad[2] = float("nan")
    y.backward(grad)
    for name, tensor in tensors.items():
        assert bool(tensor.grad.isfinite().all()), name
    assert bool(y.isfinite().all())
    assert bool((x.grad[2] == 0).all())
    assert gates.grad.view(-1)[[1, 2, 4, 5]].tolist() == [0] * 4
    for name in ("w_up", "b_up", "w_down", "b_down"):
        assert bool((tensors[name].grad[1] == 0).all()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["x", "gates", "w_up", "b_up", "w_down", "b_down"])
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_clamped", "relu", "gelu_tanh"])
def test_other_nan_passes_through(device: str, dtype: torch.dtype, where: str, activation: str) -> None:
    case = Mlp(tokens=3, experts=3, hidden=6, width=4, activation=activation, dtype=dtype)
    tensors = {n: to_device(t, device) for n, t in mlp_tensors(case, 2).items()}
    routing = scattermoe.route(torch.tensor([[0, 1], [1, 2], [1, 2]], device=device), 3)
    tensors[where].view(-1)[0] = float("nan")  # of token 0 or of expert 0, which only token 0 chose
    x, w_up, b_up, w_down, b_down, gates = tensors.values()
    y = scattermoe.moe_mlp(x, w_up, w_down, gates, routing, activation=activation, up_bias=b_up, down_bias=b_down)
    assert bool(y[0].isnan().any())
    if where in ("x", "gates", "w_up", "b_up"):
        assert bool(y[0].isnan().all())
    assert bool(y[1:].isfinite().all())


def test_float32_gates_are_not_rounded(device: str) -> None:
    # One expert, identity: y = gate * x exactly, and bfloat16 would round the gate to 1.
    gate = 1 + 2.0**-12
    x = torch.full((1, 1), 256.0, dtype=torch.bfloat16, device=device)
    eye = torch.ones(1, 1, 1, dtype=torch.bfloat16, device=device)
    gates = torch.full((1, 4097), gate, device=device, requires_grad=True)
    routing = scattermoe.route(torch.zeros(1, 4097, dtype=torch.int64, device=device), 1)
    y = scattermoe.moe_mlp(x, eye, eye, gates, routing, activation="identity")
    # 4097 * 256 * (1 + 2^-12) = 2^20 + 512 + a little; the rounded gates give 2^20 + 256. bfloat16 steps are 8192 there,
    # so compare through a cancelling slot.
    assert y.dtype == torch.bfloat16
    gates = torch.tensor([[gate, -1.0]], device=device)
    routing = scattermoe.route(torch.zeros(1, 2, dtype=torch.int64, device=device), 1)
    y = scattermoe.moe_mlp(x, eye, eye, gates, routing, activation="identity")
    assert y.item() == 256 * 2.0**-12


@pytest.mark.parametrize("weight_layout", ["contiguous", "transposed"])
def test_gradients_of_weights_have_their_strides(device: str, weight_layout: str) -> None:
    tensors = mlp_tensors(Mlp(weight_layout=weight_layout, dtype=torch.float32), 0)
    x, w_up, _, w_down, _, gates = (to_device(t, device).requires_grad_() for t in tensors.values())
    routing = scattermoe.route(make_ids(11, 2, 5, "uniform", 0).to(device), 5)
    scattermoe.moe_mlp(x, w_up, w_down, gates, routing).sum().backward()
    for weight in (w_up, w_down):
        assert weight.grad.shape == weight.shape
        if weight_layout == "contiguous":
            assert weight.grad.is_contiguous()


def test_a_function_as_activation(device: str) -> None:
    tensors = mlp_tensors(Mlp(), 4)
    x, w_up, b_up, w_down, b_down, gates = (to_device(t, device).requires_grad_() for t in tensors.values())
    inputs = [x, w_up, b_up, w_down, b_down, gates]
    routing = scattermoe.route(make_ids(11, 2, 5, "sentinels", 4).to(device), 5)

    def swiglu(z: torch.Tensor) -> torch.Tensor:
        gate, up = z.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up

    options = {"up_bias": b_up, "down_bias": b_down}
    fused = scattermoe.moe_mlp(x, w_up, w_down, gates, routing, "swiglu", **options)
    composed = scattermoe.moe_mlp(x, w_up, w_down, gates, routing, swiglu, **options)
    torch.testing.assert_close(fused, composed)
    for a, b in zip(
        torch.autograd.grad(fused.square().sum(), inputs),
        torch.autograd.grad(composed.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="named activation with recompute=True"):
        scattermoe.moe_mlp(x, w_up, w_down, gates, routing, swiglu, recompute=True)
