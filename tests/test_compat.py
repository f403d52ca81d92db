"""Scripts written for ScatterMoE 0.3: its names, arguments, layouts and results."""

import functools
import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import scattermoe
from scattermoe.activations import activation_name, apply_activation, apply_glu, is_gated
from scattermoe.mlp import GLUMLP, MLP
from scattermoe.parallel_experts import ParallelExperts, flatten_sort_count, parallel_linear


def choose(tokens: int, experts: int, top_k: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scores = torch.randn(tokens, experts, device=device, dtype=dtype).softmax(-1)
    gates, ids = scores.topk(min(top_k, experts))
    return gates.detach().requires_grad_(), ids


def slot_by_slot(mlp: MLP | GLUMLP, x: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
    """Every token through its experts, one at a time."""
    first, second = mlp.experts, mlp.output_experts
    rows = []
    for t in range(x.size(0)):
        row = torch.zeros_like(x[t])
        for j in range(ids.size(1)):
            e = int(ids[t, j])
            h = F.linear(x[t], first.weight[e], None if first.bias is None else first.bias[e])
            if isinstance(mlp, GLUMLP):
                h = mlp.activation(h[mlp.hidden_size :]) * h[: mlp.hidden_size]
            else:
                h = mlp.activation(h)
            row = row + gates[t, j] * F.linear(h, second.weight[e], None if second.bias is None else second.bias[e])
        rows.append(row)
    return torch.stack(rows) if rows else x.new_zeros(0, x.size(1))


def all_experts(mlp: MLP, x: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
    """Every token through every expert, of which the gates keep the chosen: quicker than one slot at a time."""
    weights = torch.zeros(x.size(0), mlp.num_experts, dtype=x.dtype).scatter_add(1, ids, gates)
    y = torch.zeros_like(x)
    for e in range(mlp.num_experts):
        first, second = mlp.experts, mlp.output_experts
        h = mlp.activation(F.linear(x, first.weight[e], None if first.bias is None else first.bias[e]))
        y = y + weights[:, e, None] * F.linear(h, second.weight[e], None if second.bias is None else second.bias[e])
    return y


def softsign_twice(h: Tensor) -> Tensor:
    return F.softsign(h) * 2


class LeakySiLU(nn.SiLU):
    """A subclass that computes something else."""

    def forward(self, h: Tensor) -> Tensor:
        return F.silu(h) + 0.1 * h


FUSED = [
    nn.SiLU(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.ReLU(),
    F.silu,
    F.gelu,
    torch.relu,
    functools.partial(F.gelu, approximate="tanh"),
]
COMPOSED = [nn.Tanh(), nn.LeakyReLU(0.3), softsign_twice, LeakySiLU(), nn.Sequential(nn.SiLU(), nn.Softplus())]


@pytest.mark.parametrize("kind", [MLP, GLUMLP])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "activation", [*FUSED, nn.Identity(), *COMPOSED], ids=lambda a: getattr(a, "__name__", str(a)[:24])
)
def test_numbers_and_gradients(device: str, kind: type, bias: bool, activation) -> None:
    mlp = kind(10, 6, 5, 3, bias=bias, activation=activation).to(device, torch.float64)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_(std=0.5)
    x = torch.randn(7, 10, device=device, dtype=torch.float64, requires_grad=True)
    gates, ids = choose(7, 5, 3, device, torch.float64)
    y, want = mlp(x, gates, ids), slot_by_slot(mlp, x, gates, ids)
    assert_close(y, want)
    weight = torch.randn_like(y)
    names, parameters = zip(*mlp.named_parameters(), strict=True)
    got = torch.autograd.grad((y * weight).sum(), (x, gates, *parameters))
    wanted = torch.autograd.grad((want * weight).sum(), (x, gates, *parameters))
    for name, a, b in zip(("x", "gates", *names), got, wanted, strict=True):
        assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("top_k", [2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens, width", [(1, 128), (256, 100), (20, 300)])
def test_float32_at_upstreams_sizes_and_tolerance(device: str, top_k: int, bias: bool, tokens: int, width: int) -> None:
    mlp = MLP(width, 4 * width // top_k, num_experts=8, top_k=top_k, bias=bias, activation=nn.GELU()).to(device)
    if bias:
        nn.init.normal_(mlp.experts.bias, std=0.02)
        nn.init.normal_(mlp.output_experts.bias, std=0.02)
    x = torch.randn(tokens, width, device=device, requires_grad=True)
    gates, ids = choose(tokens, 8, top_k, device, torch.float32)
    y = mlp(x, gates, ids)
    grad = torch.randn_like(y)
    wide = MLP(width, 4 * width // top_k, 8, top_k, bias=bias, activation=nn.GELU()).double()
    wide.load_state_dict(mlp.state_dict())
    x64, gates64 = (t.detach().double().cpu().requires_grad_() for t in (x, gates))
    want = all_experts(wide, x64, gates64, ids.cpu())
    assert_close(y.cpu().double(), want, rtol=0, atol=1e-4)
    got = torch.autograd.grad(y, (x, gates, *mlp.parameters()), grad)
    wanted = torch.autograd.grad(want, (x64, gates64, *wide.parameters()), grad.cpu().double())
    for a, b in zip(got, wanted, strict=True):
        assert_close(a.cpu().double(), b, rtol=0, atol=1e-4)


def test_the_fused_operator_is_taken_where_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fused = scattermoe.functional.moe_mlp
    monkeypatch.setattr(
        scattermoe.functional, "moe_mlp", lambda *args, **kw: calls.append(kw["activation"]) or fused(*args, **kw)
    )
    x = torch.randn(4, 8)
    gates, ids = choose(4, 4, 2, "cpu", torch.float32)
    for activation in FUSED:
        MLP(8, 4, 4, 2, activation=activation)(x, gates, ids)
        GLUMLP(8, 4, 4, 2, activation=activation)(x, gates, ids)
    plain = ["silu", "gelu", "gelu_tanh", "relu", "silu", "gelu", "relu", "gelu_tanh"]
    gated = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
    assert calls == [name for p in plain for name in (p, gated[p])]

    calls.clear()
    for activation in COMPOSED:
        MLP(8, 4, 4, 2, activation=activation)(x, gates, ids)
    hooked, seen = nn.SiLU(), []
    hooked.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    MLP(8, 4, 4, 2, activation=hooked)(x, gates, ids)
    assert seen == [(8, 4)]
    mlp = MLP(8, 4, 4, 2, activation=nn.SiLU())
    handle = mlp.output_experts.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    mlp(x, gates, ids)
    assert seen[1:] == [(8, 4)] and calls == []
    handle.remove()
    mlp(x, gates, ids)
    assert calls == ["silu"]


def test_wrapped_experts_are_called() -> None:
    """Adapters and parametrisations work by replacing a layer or its class."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs) -> Tensor:
            return 2 * self.inner(*args, **kwargs)

    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    mlp = MLP(8, 4, 4, 2, activation=nn.SiLU())
    x = torch.randn(4, 8)
    gates, ids = choose(4, 4, 2, "cpu", torch.float32)
    want = mlp(x, gates, ids)
    nn.utils.parametrize.register_parametrization(mlp.output_experts, "weight", Halved())
    assert_close(mlp(x, gates, ids), want / 2)
    mlp.output_experts = Doubled(mlp.output_experts)
    assert_close(mlp(x, gates, ids), want)


def test_layout_of_the_gated_layer() -> None:
    """The first half of the rows makes the values, the second half the gates."""
    mlp = GLUMLP(1, 1, 1, 1)
    with torch.no_grad():
        mlp.experts.weight.copy_(torch.tensor([[[2.0], [3.0]]]))
        mlp.output_experts.weight.fill_(1.0)
    x = torch.tensor([[0.7]])
    assert_close(mlp(x, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long)), 2 * x * F.silu(3 * x))


def test_signatures() -> None:
    def names(function) -> list[str]:
        return [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]

    assert names(MLP) == names(GLUMLP) == ["input_size", "hidden_size", "num_experts", "top_k", "bias", "activation"]
    assert names(MLP.forward)[1:] == ["x", "expert_p", "expert_idxs"]
    assert names(ParallelExperts) == ["num_experts", "input_size", "output_size", "bias"]
    order = ["sorted_expert_idxs", "sorted_scattered_idxs", "expert_offsets"]
    assert names(ParallelExperts.forward)[1:] == ["inputs", "k", *order, "gates", "grouped_in", "grouped_out"]
    flags = ["expert_biases", "gates", "grouped_in", "grouped_out"]
    assert names(parallel_linear) == ["inputs", "expert_weights", "k", *order, *flags]
    assert names(flatten_sort_count) == ["expert_idxs", "num_experts"]
    assert inspect.signature(MLP).parameters["activation"].default is None
    assert isinstance(GLUMLP(8, 4, 2, 1).activation, nn.SiLU)
    for name in ("flatten_sort_count", "ParallelExperts", "parallel_experts", "kernels", "mlp"):
        assert hasattr(scattermoe, name)
    assert scattermoe.ParallelExperts is ParallelExperts


def test_parameters_and_repr() -> None:
    mlp = GLUMLP(8, 4, 3, 5, bias=True)
    assert {name: list(p.shape) for name, p in mlp.named_parameters()} == {
        "experts.weight": [3, 8, 8],
        "experts.bias": [3, 8],
        "output_experts.weight": [3, 8, 4],
        "output_experts.bias": [3, 8],
    }
    assert mlp.top_k == 3  # clamped to the number of experts
    plain = MLP(16, 2, num_experts=4, top_k=2, activation=nn.Identity())
    assert set(plain.state_dict()) == {"experts.weight", "output_experts.weight"}
    assert plain.experts.bias is None
    text = repr(plain)
    for line in (
        "k=2",
        "(experts): ParallelExperts(num_experts=4, input_size=16, output_size=2)",
        "(output_experts): ParallelExperts(num_experts=4, input_size=2, output_size=16)",
        "(activation): Identity()",
    ):
        assert line in text
    experts = ParallelExperts(64, 32, 32, bias=True)
    assert abs(experts.weight.std().item() - 0.02) < 1e-3 and not experts.bias.any()
    assert MLP(8, 4, 3, 2, device="meta", dtype=torch.bfloat16).experts.weight.is_meta


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Tanh()], ids=str)
def test_leading_dimensions(device: str, activation: nn.Module) -> None:
    mlp = MLP(8, 4, 5, 2, activation=activation).to(device)
    x = torch.randn(2, 3, 8, device=device)
    gates, ids = choose(6, 5, 2, device, torch.float32)
    want = mlp(x.view(6, 8), gates, ids).view(2, 3, 8)
    assert_close(mlp(x, gates, ids), want)  # as in 0.3
    assert_close(mlp(x, gates.view(2, 3, 2), ids.view(2, 3, 2)), want)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(mlp(strided, gates, ids), want)
    one = MLP(8, 4, 5, 1, activation=activation).to(device)
    assert_close(one(x, gates[:, 0].view(2, 3), ids[:, 0]), one(x, gates[:, :1], ids[:, :1]))
    empty = mlp(x[:, :0], gates[:0], ids[:0])
    assert empty.shape == (2, 0, 8)
    assert mlp(x, gates.double().float(), ids.int()).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Tanh()], ids=str)
def test_narrow(device: str, dtype: torch.dtype, activation: nn.Module) -> None:
    mlp = GLUMLP(32, 16, 5, 2, activation=activation).to(device, dtype)
    x = torch.randn(9, 32, device=device, dtype=dtype)
    gates, ids = choose(9, 5, 2, device, torch.float32)
    want = slot_by_slot(mlp.double(), x.double(), gates.double(), ids).detach()
    mlp = mlp.to(dtype)
    for given in (gates, gates.to(dtype)):  # float32 gates are not rounded
        y = mlp(x, given, ids)
        assert y.dtype == dtype
        assert_close(y.double(), want, rtol=5e-2, atol=3e-2 * want.std().item())
    with torch.autocast(device, dtype=dtype):
        y = mlp.float()(x.float(), gates, ids)
    assert y.dtype == dtype
    assert_close(y.double(), want, rtol=5e-2, atol=3e-2 * want.std().item())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(7, 3), (21,), (2, 5, 2), (0, 2)])
def test_flatten_sort_count(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    ids = torch.randint(6, shape, device=device, dtype=dtype)
    sorted_ids, order, offsets = flatten_sort_count(ids, num_experts=6)
    want_ids, want_order = ids.flatten().sort(stable=True)
    assert sorted_ids.dtype == dtype and order.dtype == offsets.dtype == torch.int64
    assert torch.equal(sorted_ids, want_ids) and torch.equal(order, want_order)
    assert torch.equal(offsets, ids.flatten().long().bincount(minlength=6).cumsum(0))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "grouped_in, grouped_out, top_k, gated",
    [
        (False, False, 3, False),
        (False, False, 3, True),
        (False, True, 3, False),
        (False, False, 1, False),
        (False, False, 1, True),
        (True, False, 3, False),
        (True, False, 3, True),
        (True, True, 3, False),
    ],
)
def test_parallel_linear(device: str, bias: bool, grouped_in: bool, grouped_out: bool, top_k: int, gated: bool) -> None:
    tokens, experts = 5, 4
    gates, ids = choose(tokens, experts, top_k, device, torch.float64)
    order = flatten_sort_count(ids, experts)
    x = torch.randn(tokens * top_k if grouped_in else tokens, 6, device=device, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(experts, 6, 7, device=device, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(experts, 7, device=device, dtype=torch.float64, requires_grad=True) if bias else None
    k = 1 if grouped_in else top_k
    y = parallel_linear(x, weight, k, *order, offset, gates if gated else None, grouped_in, grouped_out)

    sorted_ids, slots, _ = order
    rows = x if grouped_in else x[slots // top_k]
    grouped = torch.stack(
        [row @ weight[e] + (0 if offset is None else offset[e]) for row, e in zip(rows, sorted_ids, strict=True)]
    )
    want = grouped if grouped_out else torch.zeros_like(grouped).index_copy(0, slots, grouped)
    if gated:
        want = (want.view(tokens, top_k, 7) * gates.unsqueeze(-1)).sum(1)
    assert_close(y, want)
    leaves = [x, weight] + ([offset] if bias else []) + ([gates] if gated else [])
    grad = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        assert_close(a, b)


def test_parallel_linear_skips_ids_outside(device: str) -> None:
    ids = torch.tensor([[0, 9], [-1, 1]], device=device)
    gates = torch.ones(2, 2, device=device)
    x = torch.randn(2, 3, device=device)
    weight = torch.randn(2, 3, 4, device=device)
    y = parallel_linear(x, weight, 2, *flatten_sort_count(ids, 2), gates=gates)
    assert_close(y, torch.stack([x[0] @ weight[0], x[1] @ weight[1]]))


def test_experts_module_chain(device: str) -> None:
    """The way 0.3's README, its MLP and its injected models use the pieces."""
    gates, ids = choose(6, 4, 2, device, torch.float32)
    sorted_expert_idxs, sorted_scattered_idxs, expert_offsets = scattermoe.flatten_sort_count(ids, num_experts=4)
    first, second = (ParallelExperts(4, a, b, bias=True).to(device) for a, b in ((8, 12), (6, 8)))
    x = torch.randn(6, 8, device=device)
    gate, h = first(x, 2, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets, grouped_out=True).chunk(2, dim=-1)
    y = second(
        F.silu(gate) * h, 1, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets, grouped_in=True, gates=gates
    )
    glu = GLUMLP(8, 6, 4, 2, bias=True).to(device)
    swapped = torch.cat(first.weight.chunk(2, 1)[::-1], 1), torch.cat(first.bias.chunk(2, 1)[::-1], 1)
    glu.load_state_dict(
        {
            "experts.weight": swapped[0],
            "experts.bias": swapped[1],
            "output_experts.weight": second.weight,
            "output_experts.bias": second.bias,
        }
    )
    assert_close(y, glu(x, gates, ids))


def test_bad_construction() -> None:
    with pytest.raises(ValueError, match="num_experts >= 1, got 0"):
        ParallelExperts(0, 8, 8)
    for kind in (MLP, GLUMLP):
        with pytest.raises(ValueError, match="top_k >= 1, got 0"):
            kind(8, 8, 4, 0)


def test_bad_input() -> None:
    x = torch.randn(4, 8)
    gates, ids = choose(4, 4, 2, "cpu", torch.float32)
    with pytest.raises(TypeError, match="activation to be a callable, got None"):
        MLP(8, 4, 4, 2)(x, gates, ids)
    mlp = MLP(8, 4, 4, 2, activation=nn.SiLU())
    with pytest.raises(ValueError, match=r"expert_idxs of shape \[4, 2\].*\[4, 1\]"):
        mlp(x, gates, ids[:, :1])
    with pytest.raises(ValueError, match=r"expert_p of shape \[4, 2\].*\[3, 2\]"):
        mlp(x, gates[:3], ids)
    order = flatten_sort_count(ids, 4)
    weight = torch.randn(4, 8, 3)
    with pytest.raises(ValueError, match=r"k=1 and 8 sorted_scattered_idxs, got \[4, 8\]"):
        parallel_linear(x, weight, 1, *order)
    with pytest.raises(ValueError, match=r"\[experts, in, out\], got \[8, 3\]"):
        parallel_linear(x, weight[0], 2, *order)
    with pytest.raises(ValueError, match="got 4 and 3"):
        parallel_linear(x, weight[:3], 2, *order)
    with pytest.raises(ValueError, match="grouped_out to be False"):
        parallel_linear(x, weight, 2, *order, gates=gates, grouped_out=True)
    with pytest.raises(ValueError, match=r"8 elements, got \[3, 2\]"):
        parallel_linear(x, weight, 2, *order, gates=gates[:3])
    with pytest.raises((TypeError, ValueError, RuntimeError), match="integer"):
        flatten_sort_count(gates.detach(), 4)
    with pytest.raises(TypeError, match=r"scattermoe\.parallel_experts\.parallel_linear"):
        scattermoe.parallel_linear(x, weight, 2, *order)


def test_activations() -> None:
    z = torch.randn(5, 8, dtype=torch.float64)
    for name in ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped"):
        assert is_gated(name)
        want = apply_activation(z, name, alpha=1.1, limit=0.4)
        assert_close(apply_activation(torch.cat(z.chunk(2, -1)[::-1], -1), name, "up_gate", 1.1, 0.4), want)
        assert_close(apply_activation(torch.stack(z.chunk(2, -1), -1).flatten(1), name, "interleaved", 1.1, 0.4), want)
        assert_close(apply_glu(*z.chunk(2, -1), name, 1.1, 0.4), want)
    for name, function in {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "identity": lambda z: z}.items():
        assert not is_gated(name)
        assert_close(apply_activation(z, name), function(z))
    for call in (lambda: is_gated("tanh"), lambda: apply_activation(z, "tanh"), lambda: apply_glu(z, z, "silu")):
        with pytest.raises(ValueError, match="swiglu"):
            call()
    with pytest.raises(ValueError, match="gate_up, up_gate, interleaved, got 'none'"):
        apply_activation(z, "swiglu", "none")
    assert activation_name(nn.Identity()) == "identity" and activation_name(nn.Identity(), gated=True) is None
    unhashable = type("Unhashable", (), {"__hash__": None, "__call__": lambda self, h: h})()
    odd = functools.partial(F.gelu, approximate="tanh", input=z)
    for activation in (lambda h: h, functools.partial(F.silu, inplace=True), odd, unhashable):
        assert activation_name(activation) is None


def test_allow_tf32_is_a_plain_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scattermoe.kernels.ops.ALLOW_TF32 is None
    mlp = MLP(8, 4, 4, 2, activation=nn.Tanh())
    x = torch.randn(4, 8)
    gates, ids = choose(4, 4, 2, "cpu", torch.float32)
    want = mlp(x, gates, ids)
    for value in (True, False):
        monkeypatch.setattr(scattermoe.kernels.ops, "ALLOW_TF32", value)
        assert_close(mlp(x, gates, ids), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Tanh()], ids=str)
def test_compile(device: str, fresh_compiler: None, activation: nn.Module) -> None:
    mlp = GLUMLP(8, 4, 5, 2, bias=True, activation=activation).to(device)
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 20):
        x = torch.randn(tokens, 8, device=device, requires_grad=True)
        gates, ids = choose(tokens, 5, 2, device, torch.float32)
        results = []
        for run in (mlp, compiled):
            y = run(x, gates, ids)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, gates, *mlp.parameters()])))
        for a, b in zip(*results, strict=True):
            assert_close(a, b)


def test_no_synchronisation(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")
    mlp = MLP(32, 16, 5, 2, bias=True, activation=nn.Tanh()).to(device)
    x = torch.randn(9, 32, device=device)
    gates, ids = choose(9, 5, 2, device, torch.float32)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mlp(x, gates, ids).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_importing_needs_nothing_else() -> None:
    """A script's first lines: the switch is there, and no heavy or optional package comes along."""
    script = (
        "import sys, scattermoe\n"
        "scattermoe.kernels.ops.ALLOW_TF32 = False\n"
        "from scattermoe.mlp import MLP, GLUMLP\n"
        "from scattermoe.parallel_experts import ParallelExperts, parallel_linear, flatten_sort_count\n"
        "assert not {'transformers', 'triton', 'matplotlib'} & set(sys.modules), sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
