"""Adapters: against weights that are W + s B A, and what they keep, compute, save and leave alone."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import scattermoe
from scattermoe import lora
from tests import reference
from tests.cases import Linear, Mlp, make, make_ids, mlp_tensors, seed_of, to_device
from tests.checks import compare
from tests.modes import Calls
from tests.test_memory import peak
from tests.test_saved_state import labels, saved_by

BASE = ("x", "w_up", "b_up", "w_down", "b_down", "gates")
FACTORS = ("up_a", "up_b", "down_a", "down_b")
R, SCALE = 3, {"up": 0.75, "down": 1.5}


# ---- The functions ---------------------------------------------------------------------------------------------------


def factors(case: Mlp, seed: int) -> dict[str, Tensor]:
    """A and B of both projections. Where pre-activations keep away from kinks (see mlp_tensors) the addend lets them."""
    n_out = case.hidden if case.n_out is None else case.n_out
    sizes = {"up": (case.hidden, case.up_rows), "down": (case.width, n_out)}
    found = {}
    for number, (name, (n_in, n_out)) in enumerate(sizes.items()):
        a = make((case.experts, R, n_in), torch.float64, seed + number, max(n_in, 1) ** -0.5)
        b = make((case.experts, n_out, R), torch.float64, seed + number + 10, 0.5)
        if name == "up" and case.activation in reference.KINKED:
            a, b = (a * 3).round().clamp(-1, 1), (b * 4).round().clamp(-1, 1) / 4
            a[:, :, 4:] = 0
        found |= {f"{name}_a": a.to(case.dtype), f"{name}_b": b.to(case.dtype)}
    return found


def scale_of(name: str, case: Mlp) -> float:
    return 1.0 if case.activation in reference.KINKED else SCALE[name]


def low_rank(t: dict[str, Tensor | None], name: str, case: Mlp) -> lora.LowRank | None:
    return None if t.get(f"{name}_a") is None else lora.LowRank(t[f"{name}_a"], t[f"{name}_b"], scale_of(name, case))


def check(case: Mlp, adapted: tuple[str, ...] = ("up", "down")) -> None:
    seed = seed_of(case)
    ids = make_ids(case.tokens, case.top_k, case.experts, case.routing, seed)
    routing = scattermoe.route(ids.to(case.device), case.experts)
    given = {name: value for name, value in factors(case, seed + 50).items() if name.split("_")[0] in adapted}

    def call(t: dict[str, Tensor | None]) -> Tensor:
        return lora.moe_mlp(
            *(t["x"], t["w_up"], t["w_down"], t["gates"], routing),
            up=low_rank(t, "up", case),
            down=low_rank(t, "down", case),
            activation=case.activation,
            glu_layout=case.glu_layout,
            up_bias=t["b_up"],
            down_bias=t["b_down"],
            limit=case.limit,
            recompute=case.recompute,
        )

    def oracle(t: dict[str, Tensor | None]) -> Tensor:
        w_up, w_down = (
            t[f"w_{name}"] + scale_of(name, case) * t[f"{name}_b"] @ t[f"{name}_a"]
            if name in adapted
            else t[f"w_{name}"]
            for name in ("up", "down")
        )
        biases = t["b_up"], t["b_down"]
        return reference.moe_mlp(
            *(t["x"], w_up, biases[0], w_down, biases[1], t["gates"], ids, case.activation, case.glu_layout),
            limit=case.limit,
        )

    slots = case.tokens * case.top_k
    inner = 2 * case.hidden + case.up_rows + 2 * R
    lengths = {"y": inner, "x": inner, "gates": inner, **dict.fromkeys((*BASE[1:5], *FACTORS), inner + slots)}
    compare("lora", call, oracle, mlp_tensors(case, seed) | given, case, lengths)


ALL = BASE + FACTORS
KIND = [(a, "gate_up") for a in reference.ACTIVATIONS] + [("swiglu", "up_gate"), ("swiglu_clamped", "interleaved")]


@pytest.mark.parametrize("activation, layout", KIND)
def test_numbers_and_gradients(device: str, activation: str, layout: str) -> None:
    check(Mlp(activation=activation, glu_layout=layout, routing="sentinels", grads=ALL, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
def test_dtypes(device: str, dtype: torch.dtype, activation: str) -> None:
    check(Mlp(activation=activation, dtype=dtype, gates=torch.float32, grads=ALL, device=device))


CORNERS = {
    "empty experts": {"experts": 60},
    "one expert": {"routing": "one_expert"},
    "all sentinels": {"routing": "all_sentinels"},
    "no tokens": {"tokens": 0},
    "one token": {"tokens": 1, "top_k": 1},
    "repeated": {"routing": "repeated", "top_k": 3},
    "no bias": {"biases": ()},
    "bias of one": {"biases": ("b_down",)},
    "transposed": {"weight_layout": "transposed", "grad_layout": "transposed"},
    "strided": {"x_layout": "strided", "gates_layout": "strided"},
    "recompute": {"recompute": True},
    "other width": {"n_out": 10},
    "frozen base": {"grads": ("x", "gates", *FACTORS)},
    "frozen input": {"grads": FACTORS},
    "B alone": {"grads": ("up_b", "down_b")},
    "A of one": {"grads": ("down_a",)},
    "base alone": {"grads": BASE},
    "biases alone": {"grads": ("b_up", "b_down")},
}


@pytest.mark.parametrize("fields", CORNERS.values(), ids=CORNERS.keys())
def test_corners(device: str, fields: dict[str, Any]) -> None:
    check(Mlp(**({"routing": "sentinels", "grads": ALL, "device": device} | fields)))


@pytest.mark.parametrize("adapted", ["up", "down"])
@pytest.mark.parametrize("recompute", [False, True])
def test_one_projection(device: str, adapted: str, recompute: bool) -> None:
    check(Mlp(routing="sentinels", grads=ALL, device=device, recompute=recompute), (adapted,))


@pytest.mark.parametrize("rows", ["token", "slot", "grouped"])
@pytest.mark.parametrize("grouped_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_parallel_linear(device: str, rows: str, grouped_out: bool, dtype: torch.dtype) -> None:
    case = Linear(rows=rows, grouped_out=grouped_out, routing="sentinels", dtype=dtype, device=device)
    case = Linear(**(vars(case) | {"grads": ("x", "weight", "bias", "a", "b")}))
    ids = make_ids(case.tokens, case.top_k, case.experts, case.routing, 1)
    slots = case.tokens * case.top_k
    tensors = {
        "x": make((case.tokens if rows == "token" else slots, case.n_in), dtype, 2),
        "weight": make((case.experts, case.n_out, case.n_in), dtype, 3, case.n_in**-0.5),
        "bias": make((case.experts, case.n_out), dtype, 4),
        "a": make((case.experts, R, case.n_in), dtype, 5, case.n_in**-0.5),
        "b": make((case.experts, case.n_out, R), dtype, 6),
    }
    routing = scattermoe.route(ids.to(device), case.experts)

    def call(t: dict[str, Tensor]) -> Tensor:
        added = lora.LowRank(t["a"], t["b"], 0.5)
        return lora.parallel_linear(
            t["x"], t["weight"], routing, added, bias=t["bias"], grouped_in=rows == "grouped", grouped_out=grouped_out
        )

    def oracle(t: dict[str, Tensor]) -> Tensor:
        return reference.parallel_linear(t["x"], t["weight"] + 0.5 * t["b"] @ t["a"], t["bias"], ids, rows, grouped_out)

    lengths = dict.fromkeys(("y", "x", "weight", "bias", "a", "b"), slots + case.n_in + case.n_out * case.top_k)
    compare("lora_linear", call, oracle, tensors, case, lengths)


def leaves(case: Mlp, device: str, wanted: tuple[str, ...] = ALL) -> tuple[dict[str, Tensor], scattermoe.Routing]:
    tensors = {n: to_device(t, device).detach() for n, t in (mlp_tensors(case, 1) | factors(case, 2)).items()}
    for name in wanted:
        tensors[name].requires_grad_()
    ids = make_ids(case.tokens, case.top_k, case.experts, "sentinels", 1).to(device)
    return tensors, scattermoe.route(ids, case.experts)


def run(t: dict[str, Tensor], routing: scattermoe.Routing, dropout: float = 0.0, **options: Any) -> Tensor:
    return lora.moe_mlp(
        *(t["x"], t["w_up"], t["w_down"], t["gates"], routing),
        up=lora.LowRank(t["up_a"], t["up_b"], SCALE["up"], dropout),
        down=lora.LowRank(t["down_a"], t["down_b"], SCALE["down"], dropout),
        up_bias=t["b_up"],
        down_bias=t["b_down"],
        **options,
    )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(dropout: float, recompute: bool) -> None:
    tensors, routing = leaves(Mlp(), "cpu")

    def call(*values: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same elements are dropped
        return run(dict(zip(ALL, values, strict=True)), routing, dropout, recompute=recompute)

    assert torch.autograd.gradcheck(call, tuple(tensors[name] for name in ALL), fast_mode=True)


def test_dropout_is_that_of_the_input(device: str) -> None:
    # Identities everywhere, so that the addend is the input with elements dropped and the others scaled up.
    size, tokens = 8, 500
    routing = scattermoe.route(torch.zeros(tokens, 1, dtype=torch.long, device=device), 1)
    x = torch.rand(tokens, size, device=device) + 1
    eye, zero = torch.eye(size, device=device).unsqueeze(0), torch.zeros(1, size, size, device=device)
    gates = torch.ones(tokens, 1, device=device)
    dropped = lora.LowRank(eye, eye, 1.0, 0.25)
    for found in (
        lora.parallel_linear(x, zero, routing, dropped),
        lora.moe_mlp(x, zero, eye, gates, routing, up=dropped, activation="identity"),
        lora.moe_mlp(x, eye, zero, gates, routing, down=dropped, activation="identity"),
    ):
        kept = found != 0
        assert_close(found[kept], (x / 0.75)[kept])
        assert 0.2 < 1 - kept.float().mean() < 0.3


def test_any_function_as_activation(device: str) -> None:
    tensors, routing = leaves(Mlp(), device)
    wanted = [tensors[name] for name in ALL]
    results = []
    for activation in ("swiglu", lambda z: F.silu(z[:, : z.size(1) // 2]) * z[:, z.size(1) // 2 :]):
        y = run(tensors, routing, activation=activation)
        results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    for a, b in zip(*results, strict=True):
        assert_close(a, b)
    with pytest.raises(ValueError, match="recompute=True, got a function"):
        run(tensors, routing, activation=torch.tanh, recompute=True)


def test_a_second_derivative_is_refused(device: str) -> None:
    tensors, routing = leaves(Mlp(), device)
    y = run(tensors, routing)
    with pytest.raises(RuntimeError, match=r"lora\.moe_mlp does not support second derivatives"):
        torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)


def test_dtypes_that_do_not_fit(device: str) -> None:
    tensors, routing = leaves(Mlp(dtype=torch.float32), device)
    with pytest.raises(TypeError, match=r"x\.dtype == w_up\.dtype == w_down\.dtype, got .*bfloat16"):
        run(tensors | {"x": tensors["x"].bfloat16()}, routing)


# ---- What is kept and what is computed -------------------------------------------------------------------------------

SAVED = Mlp(tokens=32, top_k=4, experts=6, hidden=40, width=24, dtype=torch.bfloat16, gates=torch.float32)
SLOTS = SAVED.tokens * SAVED.top_k
TRAINED = ("x", "gates", *FACTORS)


def held(kept: list[Tensor], tensors: dict[str, Tensor]) -> int:
    parameters = {t.data_ptr() for n, t in tensors.items() if n not in ("x", "gates")}
    return sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in parameters)


@pytest.mark.parametrize("recompute", [False, True])
def test_saved_is_what_moe_mlp_saves_and_the_rows_of_rank_r(device: str, recompute: bool) -> None:
    tensors, routing = leaves(SAVED, device, TRAINED)
    kept = saved_by(lambda: run(tensors, routing, recompute=recompute))
    u = str(2 * SLOTS * R)
    z = ["b_up", "w_up"] if recompute else [str(2 * SLOTS * SAVED.up_rows), "w_up"]
    indices = ["expert_offsets", "slot_order", "slot_position"]
    assert labels(tensors, routing, kept) == sorted(["x", *z, "w_down", "b_down", "gates", *FACTORS, *indices, u])

    for name in FACTORS[:2]:
        tensors[name].requires_grad_(False)
    plain = {name: tensors[name].detach().requires_grad_() for name in BASE}
    without = saved_by(
        lambda: scattermoe.moe_mlp(
            *(plain["x"], plain["w_up"], plain["w_down"], plain["gates"], routing),
            up_bias=plain["b_up"],
            down_bias=plain["b_down"],
            recompute=recompute,
        )
    )
    assert held(kept, tensors) == held(without, plain) + int(u)


def test_x_is_not_kept_for_b_alone(device: str) -> None:
    tensors, routing = leaves(SAVED, device, ("x", "gates", "up_b", "down_a", "down_b"))
    assert "x" not in labels(tensors, routing, saved_by(lambda: run(tensors, routing)))


def test_autocast_keeps_no_copy_of_the_weights(device: str) -> None:
    tensors, routing = leaves(Mlp(**(vars(SAVED) | {"dtype": torch.float32})), device, TRAINED)

    def call() -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return run(tensors, routing)

    found = labels(tensors, routing, saved_by(call))
    assert "w_up" in found and "w_down" in found
    assert str(2 * tensors["w_up"].numel()) not in found and str(2 * tensors["w_down"].numel()) not in found
    y = call()
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), [tensors[name] for name in TRAINED])
    assert all(grad.dtype == torch.float32 for grad in grads)
    narrow = {
        n: (t if n == "gates" else t.detach().bfloat16()).requires_grad_(n in TRAINED) for n, t in tensors.items()
    }
    by_hand = run(narrow, routing)
    assert torch.equal(y, by_hand)
    expected = torch.autograd.grad(by_hand.float().square().sum(), [narrow[name] for name in TRAINED])
    for name, a, b in zip(TRAINED, grads, expected, strict=True):
        assert torch.equal(a, b.float()), name


def test_nothing_of_the_size_of_the_weights_is_formed(device: str) -> None:
    case = Mlp(tokens=16, experts=64, hidden=96, width=64, dtype=torch.float32)
    tensors, routing = leaves(case, device, TRAINED)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(tensors, routing).sum(), [tensors[name] for name in TRAINED])

    weights = 4 * (tensors["w_up"].numel() + tensors["w_down"].numel())
    assert peak(step, device) < weights / 4


def products_of_weight_gradients(calls: Calls) -> list[tuple[int, ...]]:
    """The shapes of the weights whose gradient was computed."""
    found = []
    for name, args in calls.seen:
        if name == "_parallel_linear_backward" and args[-1][1]:
            found.append(tuple(args[2].shape))
        if name == "_moe_mlp_backward":
            assert not args[-1][1] and not args[-1][3]
    return found


# ---- The layers ------------------------------------------------------------------------------------------------------

HIDDEN, WIDTH, EXPERTS, TOP_K, TOKENS = 12, 10, 5, 2, 9


class Tanh(nn.Module):
    """An activation that is none of the fused ones."""

    def forward(self, z: Tensor) -> Tensor:
        return z.tanh()


class Compat(nn.Module):
    """ScatterMoE's layers with a choice of experts."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.router = nn.Linear(HIDDEN, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        gates, experts = self.router(x.flatten(0, 1)).softmax(-1).topk(TOP_K)
        return self.mlp(x, gates, experts)


class Alone(nn.Module):
    """Two ParallelExperts with any function between them."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.first = scattermoe.ParallelExperts(EXPERTS, HIDDEN, WIDTH, bias=True)
        self.second = scattermoe.ParallelExperts(EXPERTS, WIDTH, HIDDEN, bias=True)
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        gates, experts = self.router(tokens).softmax(-1).topk(TOP_K)
        order = scattermoe.flatten_sort_count(experts, EXPERTS)
        h = self.first(tokens, TOP_K, *order, grouped_out=self.gated).sin()
        if self.gated:
            return self.second(h, 1, *order, gates=gates, grouped_in=True)
        return self.second(h, 1, *order).view(-1, TOP_K, HIDDEN).sum(1)


class First(nn.Module):
    """A layer that returns its losses as well."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


SIZES = (HIDDEN, WIDTH, EXPERTS, TOP_K)
MLP_SIZES = (HIDDEN, WIDTH, EXPERTS, TOP_K)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "moe": lambda: First(scattermoe.MoE(*SIZES, shared_intermediate_size=8)),
    "moe, bias": lambda: First(scattermoe.MoE(*SIZES, bias=True, activation="gelu")),
    "moe, gpt-oss": lambda: First(
        scattermoe.MoE(*SIZES, bias=True, activation="swiglu_clamped", glu_layout="interleaved", alpha=1.3, limit=0.5)
    ),
    "moe, recompute": lambda: First(scattermoe.MoE(*SIZES, recompute=True)),
    "attention": lambda: First(
        scattermoe.MixtureOfAttention(HIDDEN, EXPERTS, TOP_K, 2, 4, expert_bias=True, bias=True)
    ),
    "mlp": lambda: Compat(scattermoe.MLP(*MLP_SIZES, bias=True, activation=nn.GELU())),
    "mlp, tanh": lambda: Compat(scattermoe.MLP(*MLP_SIZES, activation=Tanh())),
    "glumlp": lambda: Compat(scattermoe.GLUMLP(*MLP_SIZES, bias=True)),
    "glumlp, tanh": lambda: Compat(scattermoe.GLUMLP(*MLP_SIZES, activation=Tanh())),
    "parallel experts": lambda: Alone(gated=False),
    "parallel experts, gates": lambda: Alone(gated=True),
}
TARGETS = {"attention": ("query", "output"), "parallel experts": ("linear",), "parallel experts, gates": ("linear",)}


def build(kind: str, device: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = LAYERS[kind]().to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def randomise(model: nn.Module) -> None:
    """Adapters as after training."""
    with torch.no_grad():
        for parameter in lora.adapter_parameters(model):
            parameter.normal_(std=0.4)


def with_sums(model: nn.Module) -> nn.Module:
    """The same model without adapters, its weights W + alpha / r B A, which get gradients."""
    adapters = lora.adapter_state_dict(model)
    plain = copy.deepcopy(model)
    lora.remove(plain)
    for path, module in model.named_modules():
        if isinstance(module, lora.Adapters):
            owner = plain.get_submodule(path.removesuffix(".lora"))
            names = {
                "up": getattr(owner, "_up_name", "experts.weight"),
                "down": "down_proj" if hasattr(owner, "down_proj") else "output_experts.weight",
                "query": "q_proj",
                "output": "o_proj",
                "linear": "weight",
            }
            for target, adapter in module.items():
                *inner, name = names[target].split(".")
                weight = getattr(owner.get_submodule(".".join(inner)), name)
                a, b = (adapters[f"{path}.{target}.{factor}"] for factor in "AB")
                weight.data += adapter.alpha / adapter.r * b @ a
    return plain.requires_grad_()


def adapted(kind: str, device: str, base: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    model = build(kind, device, base)
    lora.add_adapters(model, r=R, alpha=2 * R, **options)
    randomise(model)
    return model


def tokens(device: str, dtype: torch.dtype = torch.float64, length: int = TOKENS) -> Tensor:
    return make((2, length, HIDDEN), dtype, 1).to(device)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers(device: str, kind: str) -> None:
    model = build(kind, device)
    x = tokens(device).requires_grad_()
    before, kinds = model(x), [type(m) for m in model.modules()]
    report = lora.add_adapters(model, r=R, alpha=2 * R)
    assert {entry.targets for entry in report} == {TARGETS.get(kind, ("up", "down"))}
    assert sum(entry.num_parameters for entry in report) == sum(p.numel() for p in lora.adapter_parameters(model))
    assert_close(model(x), before)  # B is zero
    assert all(p.any() == (p.shape[1] == R) for p in lora.adapter_parameters(model))

    randomise(model)
    plain = with_sums(model)
    assert [type(m) for m in plain.modules()] == kinds
    weight = torch.randn_like(before)
    with Calls() as calls:
        (model(x) * weight).sum().backward()
    got, x.grad = x.grad, None
    (plain(x) * weight).sum().backward()
    assert_close(model(x), plain(x))
    assert not torch.allclose(model(x), before)
    assert_close(got, x.grad)
    # dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T.
    sums = {n: p.grad for n, p in plain.named_parameters() if p.dim() == 3}
    for path, module in model.named_modules():
        if isinstance(module, lora.Adapter):
            a, b = module.A, module.B
            want = next(
                g
                for n, g in sums.items()
                if g.shape == (EXPERTS, b.size(1), a.size(2)) and n.startswith(path.split(".lora")[0])
            )
            assert_close(a.grad, 2 * b.mT @ want)
            assert_close(b.grad, 2 * want @ a.mT)
    # The base is frozen, and no product was spent on its gradient.
    owned = {id(p) for p in lora.adapter_parameters(model)}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (id(parameter) not in owned), name
    products = products_of_weight_gradients(calls)
    assert len(products) == len(owned)
    assert all(R in shape[1:] for shape in products)


@pytest.mark.parametrize("kind", ["moe", "attention", "glumlp", "parallel experts, gates"])
def test_wide_adapters_on_a_narrow_base(device: str, kind: str) -> None:
    model = adapted(kind, device, torch.bfloat16, dtype=torch.float32)
    x = tokens(device, torch.bfloat16)
    y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in lora.adapter_parameters(model))
    want = with_sums(copy.deepcopy(model).double())(x.double())
    assert F.cosine_similarity(y.double().flatten(), want.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("kind", LAYERS)
def test_merge_and_unmerge(device: str, kind: str) -> None:
    model = adapted(kind, device)
    x, names = tokens(device), list(model.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    want, plain = model(x), with_sums(model)
    lora.merge(model)
    lora.merge(model)  # nothing more to add
    with Calls() as calls:
        merged = model(x)
    assert_close(merged, want)
    assert_close(merged, plain(x))
    assert not any(R in args[1].shape for name, args in calls.seen if name == "parallel_linear")
    assert list(model.state_dict()) == names  # the weights that are kept are not saved
    twin = copy.deepcopy(model)
    for other in (model, twin):
        lora.unmerge(other)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
        assert torch.equal(other(x), want)

    lora.merge(model, keep_base=False)
    with pytest.raises(ValueError, match=r"expected adapters merged with keep_base=True, got keep_base=False"):
        lora.unmerge(model)
    lora.remove(model)
    assert torch.equal(model(x), merged)
    assert list(model.state_dict()) == [name for name in names if ".lora." not in name]


def test_merging_rounds_once() -> None:
    model = adapted("moe", "cpu", torch.bfloat16, dtype=torch.float32)
    experts = model.layer.experts
    adapter, weight = experts.lora["up"], experts.gate_up_proj.clone()
    lora.merge(model)
    exact = weight.double() + 2 * adapter.B.double() @ adapter.A.double()
    assert ((experts.gate_up_proj.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def test_weights_shared_by_two_layers_are_not_merged() -> None:
    model = nn.ModuleList([scattermoe.MoE(*SIZES), scattermoe.MoE(*SIZES)])
    model[1].experts.down_proj = model[0].experts.down_proj
    lora.add_adapters(model, targets="down")
    before = model[0].experts.down_proj.clone()
    with pytest.raises(
        ValueError, match=r"1\.experts\.down_proj: expected a weight of its own, got that of 0\.experts\.down_proj"
    ):
        lora.merge(model)
    assert torch.equal(model[0].experts.down_proj, before)


def test_state_dict(device: str) -> None:
    model, other = adapted("moe", device), build("moe", device)
    base = {name: value.clone() for name, value in other.state_dict().items()}
    lora.add_adapters(other, r=R, alpha=2 * R)
    state = lora.adapter_state_dict(model)
    assert list(state) == [f"layer.experts.lora.{target}.{factor}" for target in ("up", "down") for factor in "AB"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    # The base's names are those from before.
    assert other.load_state_dict(base, strict=False) == (list(state), [])
    lora.load_adapter_state_dict(other, {name: value.float().cpu() for name, value in state.items()})
    for name, value in lora.adapter_state_dict(other).items():
        assert torch.equal(value, state[name].float().to(value.dtype))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens(device)), model(tokens(device)))

    kept = {name: value.clone() for name, value in state.items()}
    for wrong, message in (
        ({"layer.experts.lora.up.A": state["layer.experts.lora.up.A"]}, r"missing: \['layer.experts.lora.down.A'"),
        (state | {"head": torch.zeros(1)}, r"unexpected: \['head'\]"),
        (
            state | {"layer.experts.lora.up.B": torch.zeros(1, 2, 3)},
            r"layer\.experts\.lora\.up\.B: expected shape .* \[1, 2, 3\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            lora.load_adapter_state_dict(model, wrong)
    assert all(torch.equal(value, kept[name]) for name, value in lora.adapter_state_dict(model).items())
    lora.merge(model)
    with pytest.raises(ValueError, match=r"layer\.experts\.lora: expected adapters that are not merged"):
        lora.load_adapter_state_dict(model, state)


def test_copies(device: str) -> None:
    model, x = adapted("moe", device), tokens(device)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in model.parameters()}
        lora.remove(other)
        assert type(other.layer.experts) is scattermoe.Experts
    assert isinstance(model.layer.experts, scattermoe.Experts)
    assert "r=3, alpha=6" in repr(model)


def test_dropout_is_for_training_alone(device: str) -> None:
    for kind in ("moe", "attention", "mlp, tanh", "parallel experts"):
        model, x = adapted(kind, device, dropout=0.5), tokens(device)
        want = with_sums(model)(x)
        assert not torch.allclose(model(x), want)
        assert_close(model.eval()(x), want)


def test_choosing_layers() -> None:
    def blocks() -> nn.ModuleDict:
        return nn.ModuleDict({"a": build("moe", "cpu"), "ab": build("attention", "cpu"), "c": build("glumlp", "cpu")})

    def paths(**options: Any) -> dict[str, tuple[str, ...]]:
        model = blocks()
        report = lora.add_adapters(model, **options)
        assert {p.split(".lora")[0] for p in lora.adapter_state_dict(model)} == {entry.path for entry in report}
        return {entry.path: entry.targets for entry in report}

    everything = {"a.layer.experts": ("up", "down"), "ab.layer.experts": ("query", "output"), "c.mlp": ("up", "down")}
    assert paths() == everything
    assert paths(targets=["down", "query"]) == {
        "a.layer.experts": ("down",),
        "ab.layer.experts": ("query",),
        "c.mlp": ("down",),
    }
    assert paths(modules=["a", "c.mlp"]) == {p: t for p, t in everything.items() if p != "ab.layer.experts"}
    model = blocks()
    lora.add_adapters(model, freeze=False, modules="a")
    assert all(p.requires_grad for p in model.parameters())


class Subclass(scattermoe.Experts):
    def forward(self, *args: Any) -> Tensor:
        return -super().forward(*args)


def quantised() -> nn.Module:
    model = build("moe", "cpu")
    model.layer.experts.down_proj = nn.Parameter(
        torch.zeros(EXPERTS, HIDDEN, WIDTH, dtype=torch.int8), requires_grad=False
    )
    return model


def adapted_already() -> nn.Module:
    return adapted("moe", "cpu")


def overridden() -> nn.Module:
    return nn.Sequential(Subclass(EXPERTS, HIDDEN, WIDTH))


def hooked() -> nn.Module:
    model = build("glumlp", "cpu")
    model.mlp.experts.register_forward_hook(lambda *_: None)
    return model


def parametrised() -> nn.Module:
    model = build("moe", "cpu")
    nn.utils.parametrize.register_parametrization(model.layer.experts, "gate_up_proj", nn.Identity())
    return model


@pytest.mark.parametrize(
    "make_model, options, kind, message",
    [
        (
            quantised,
            {},
            ValueError,
            r"layer\.experts\.down_proj: expected weights .*float16, got Parameter .* of torch\.int8",
        ),
        (adapted_already, {}, ValueError, r"layer\.experts .*: expected a layer without adapters"),
        (
            overridden,
            {},
            TypeError,
            r"0 \(Subclass\): expected a layer that computes as Experts, .* a forward of its own",
        ),
        (hooked, {}, TypeError, r"mlp \(GLUMLP\): expected experts to be a plain ParallelExperts without hooks"),
        (parametrised, {}, ValueError, r"layer\.experts\.gate_up_proj: expected a parameter, got none"),
        (
            lambda: nn.Linear(3, 3),
            {},
            ValueError,
            "expected a layer with one of the targets up, .* in Linear, found none",
        ),
        (lambda: build("moe", "cpu"), {"targets": ("query",)}, ValueError, "targets query in First, found none"),
        (lambda: build("moe", "cpu"), {"targets": ("gate",)}, ValueError, r"targets out of up, down, .*\['gate'\]"),
        (lambda: build("moe", "cpu"), {"targets": ()}, ValueError, "targets out of"),
        (lambda: build("moe", "cpu"), {"modules": ["layer.gate"]}, ValueError, r"layer\.gate: expected the path"),
        (lambda: build("moe", "cpu"), {"r": 0}, ValueError, "r to be an integer >= 1, got 0"),
        (lambda: build("moe", "cpu"), {"dropout": 1.0}, ValueError, "0 <= dropout < 1, got 1.0"),
        (lambda: build("moe", "cpu"), {"dtype": torch.int8}, ValueError, "dtype to be one of .*int8"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:20],
)
def test_errors_name_the_layer_and_leave_the_model(
    make_model: Callable[[], nn.Module], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    # In front of the layer that fails is one that could have adapters.
    model = make_model() if options else nn.ModuleDict({"z": make_model()})
    if not options and not isinstance(model["z"], nn.Linear):
        model = nn.ModuleDict({"a": build("moe", "cpu"), "z": model["z"]})
        message = message if message.startswith("expected") else r"z\." + message
    state = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    kinds = [type(m) for m in model.modules()]
    message = message.replace("in Linear", "in ModuleDict")
    with pytest.raises(kind, match=message):
        lora.add_adapters(model, **options)
    assert [type(m) for m in model.modules()] == kinds
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == state


@pytest.mark.parametrize("function", [lora.adapter_parameters, lora.merge, lora.unmerge, lora.remove])
def test_a_model_without_adapters(function: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ValueError, match="expected a model with adapters, got a First without"):
        function(build("moe", "cpu"))


# ---- The tools around a layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["moe", "moe, gpt-oss", "moe, recompute", "attention", "glumlp", "mlp, tanh"])
def test_compile(device: str, fresh_compiler: None, kind: str) -> None:
    model = adapted(kind, device, torch.float32)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    compilations = []
    for length in (4, 17, 40):
        x = tokens(device, torch.float32, length).requires_grad_()
        torch._dynamo.mark_dynamic(x, 1)
        results = []
        for function in (model, compiled):
            y = function(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *lora.adapter_parameters(model)])))
        for a, b in zip(*results, strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.detach().abs().max()))
        compilations.append(graphs.frame_count)
    assert compilations[0] == compilations[-1]  # other lengths need no other graph


@pytest.mark.parametrize("strict", [False, True])
def test_export_and_inference_mode(device: str, strict: bool) -> None:
    model = adapted("moe", device, torch.float32).eval()
    length = torch.export.Dim("length", min=2)
    program = torch.export.export(model, (tokens(device, torch.float32),), dynamic_shapes=({1: length},), strict=strict)
    longer = tokens(device, torch.float32, 14)
    with torch.inference_mode():
        assert_close(program.module()(longer), model(longer))


def test_compile_with_autocast_and_dropout(device: str, fresh_compiler: None) -> None:
    model = adapted("moe", device, torch.float32, dropout=0.5)
    x = tokens(device, torch.float32)

    def step(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return model(x)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        torch.manual_seed(5)
        y = function(x)
        results.append((y, *torch.autograd.grad(y.float().sum(), lora.adapter_parameters(model))))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, rtol=2**-6, atol=2**-6 * float(a.detach().abs().max()))


@pytest.mark.parametrize("kind", ["moe", "attention", "mlp, tanh"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(device: str, kind: str, reentrant: bool) -> None:
    model, x = adapted(kind, device, dropout=0.3), tokens(device).requires_grad_()
    results = []
    for function in (model, functools.partial(checkpoint, model, use_reentrant=reentrant)):
        model.zero_grad()
        torch.manual_seed(4)
        function(x).square().sum().backward()
        results.append([p.grad for p in lora.adapter_parameters(model)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training(device: str, dtype: torch.dtype) -> None:
    """The adapters learn a low-rank change of every expert that the base does not have."""
    torch.manual_seed(0)
    teacher = nn.Sequential(adapted("attention", device, dtype), adapted("moe", device, dtype))
    student = copy.deepcopy(teacher)
    lora.remove(student)
    base = {name: value.clone() for name, value in student.state_dict().items()}
    lora.add_adapters(student, r=R, alpha=2 * R, dtype=torch.float32)
    optimiser = torch.optim.AdamW(lora.adapter_parameters(student), lr=1e-2)
    x = tokens(device, dtype, 32)
    want, losses = teacher(x).detach().float(), []
    for _ in range(60):
        optimiser.zero_grad()
        loss = F.mse_loss(student(x).float(), want)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
    state = student.state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.items())
    before = student(x)
    lora.merge(student)
    assert_close(student(x), before, rtol=0.05, atol=0.05 * float(before.detach().abs().max()))


def test_the_activation_by_itself_says_what_is_wrong() -> None:
    ops, settings = torch.ops.scattermoe, ("swiglu", "gate_up", 1.702, 7.0)
    routing = scattermoe.route(torch.zeros(2, 2, dtype=torch.long), 1)
    h, z, gates = torch.zeros(4, 3), torch.zeros(4, 6), torch.zeros(2, 2)
    index = routing.slot_order, routing.expert_offsets
    ops._activation_backward(h, z, gates, *index, *settings)
    for call, message in (
        (lambda: ops._activation(z[:, :5], *settings), r"z\.size\(1\) % 2 .*1 and 0"),
        (lambda: ops._activation(z, "tanh", *settings[1:]), "tanh"),
        (lambda: ops._activation_backward(h[:, :2], z, gates, *index, *settings), r"grad_hidden\.size\(1\).*2 and 3"),
        (lambda: ops._activation_backward(h, z[:3], gates, *index, *settings), r"z\.size\(0\).*3 and 4"),
        (lambda: ops._activation_backward(h, z, gates[:1], *index, *settings), r"gates\.numel\(\).*2 and 4"),
        (lambda: ops._activation_backward(h, z.double(), gates, *index, *settings), "dtype"),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            call()


# ---- Other libraries' models -----------------------------------------------------------------------------------------


@pytest.fixture
def parity() -> Any:
    """Small random models of transformers."""
    pytest.importorskip("transformers")
    import scattermoe.transformers  # noqa: F401  (registers "scattermoe")
    from tests import parity

    return parity


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "jamba"])
def test_transformers(device: str, parity: Any, name: str) -> None:
    """Against the same model with W + s B A as its weights and transformers' own loop over experts."""
    model = parity.build(name, device, torch.float64)
    inputs = parity.batch(model)
    before, kinds, names = model(**inputs).logits, [type(m) for m in model.modules()], list(model.state_dict())
    with pytest.raises(ValueError, match=r'experts .*: expected the experts implementation "scattermoe", got'):
        lora.add_adapters(model)
    model.set_experts_implementation("scattermoe")
    report = lora.add_adapters(model, r=R, alpha=2 * R)
    assert all(entry.targets == ("up", "down") for entry in report)
    assert_close(model(**inputs).logits, before)
    randomise(model)

    merged = copy.deepcopy(model)
    lora.merge(merged)
    lora.remove(merged)
    merged.set_experts_implementation("eager")
    assert [type(m) for m in merged.modules()] == kinds and list(merged.state_dict()) == names
    got = model(**inputs).logits
    assert not torch.allclose(got, before)
    assert_close(got, merged(**inputs).logits)

    weight = torch.randn_like(got)
    with Calls() as calls:
        (got * weight).sum().backward()
    assert all(R in shape[1:] for shape in products_of_weight_gradients(calls))
    merged.requires_grad_(True)
    (merged(**inputs).logits * weight).sum().backward()
    for entry in report:
        for target, projection in lora.adapters.projections(merged.get_submodule(entry.path)).items():
            want = getattr(projection.owner, projection.name).grad
            want = want.mT if projection.transposed else want
            adapter = model.get_submodule(f"{entry.path}.lora.{target}")
            for found, correct in (
                (adapter.A.grad, 2 * adapter.B.mT @ want),
                (adapter.B.grad, 2 * want @ adapter.A.mT),
            ):
                # Some models compute parts of themselves in float32 whatever their dtype is.
                assert_close(found, correct, rtol=1e-4, atol=1e-5 * float(correct.detach().abs().max()))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

    # No other implementation may leave the adapters out.
    model.set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match=r"has adapters of scattermoe\.lora, which .* 'eager'"):
        model(**inputs)
    lora.remove(model)
    assert_close(model(**inputs).logits, before)


def test_transformers_generates(device: str, parity: Any) -> None:
    model = parity.build("qwen3_moe", device, torch.float32)
    model.set_experts_implementation("scattermoe")
    lora.add_adapters(model, r=R)
    randomise(model)
    inputs = parity.batch(model)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(**inputs, **options)
    lora.merge(model)
    assert torch.equal(model.generate(**inputs, **options), tokens)


def test_stacked_experts_of_a_replaced_model(device: str) -> None:
    """Experts that scattermoe.replace_moe stacked keep the state dict of single experts, and the adapters beside it."""
    from examples.swap_into_model import LoopMoE

    model = LoopMoE(HIDDEN, WIDTH, EXPERTS, TOP_K).to(device, torch.float64)
    names, x = list(model.state_dict()), tokens(device)
    scattermoe.replace_moe(model)
    lora.add_adapters(model, r=R, alpha=2 * R)
    randomise(model)
    want, state = model(x), lora.adapter_state_dict(model)
    assert [name for name in model.state_dict() if name not in state] == names
    lora.merge(model)
    lora.remove(model)
    assert_close(model(x), want)
    plain = LoopMoE(HIDDEN, WIDTH, EXPERTS, TOP_K).to(device, torch.float64)
    plain.load_state_dict(model.state_dict())
    assert_close(plain(x), want)
