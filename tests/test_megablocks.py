"""`from_megablocks`: MegaBlocks' layers, written out as loops with its parameters, and ours with the converted weights."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from scattermoe import MoE, from_megablocks

TOKENS, HIDDEN, INNER, EXPERTS = 24, 16, 12, 4


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(HIDDEN, EXPERTS, bias=False)


class ExpertWeights(nn.Module):
    """The parameters of all experts in one matrix each (dMoE), or in one tensor each (MoE)."""

    def __init__(self, gated: bool, dropless: bool) -> None:
        super().__init__()
        shape = (EXPERTS * INNER, HIDDEN) if dropless else (EXPERTS, HIDDEN, INNER)
        self.w1 = nn.Parameter(torch.randn(shape) / 4)
        if gated:
            self.v1 = nn.Parameter(torch.randn(shape) / 4)
        self.w2 = nn.Parameter(torch.randn(shape if dropless else (EXPERTS, INNER, HIDDEN)) / 4)


class ExpertMLPs(nn.Module):
    def __init__(self, gated: bool, dropless: bool) -> None:
        super().__init__()
        self.mlp = ExpertWeights(gated, dropless)


class Layer(nn.Module):
    """dMoE, or MoE with capacities: an expert's slots beyond its capacity, in the order of the tokens, are dropped."""

    def __init__(
        self,
        top_k: int,
        *,
        gated: bool = True,
        activation: Callable[[Tensor], Tensor] = F.silu,
        normalize: int | None = None,
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__()
        self.router = Router()
        self.experts = ExpertMLPs(gated, dropless=capacity_factor is None)
        self.top_k, self.gated, self.activation, self.normalize = top_k, gated, activation, normalize
        self.capacity = TOKENS if capacity_factor is None else int(capacity_factor * top_k * TOKENS / EXPERTS)

    def expert(self, e: int, x: Tensor) -> Tensor:
        weights = self.experts.mlp
        if weights.w1.dim() == 3:
            return self.activation(x @ weights.w1[e]) @ weights.w2[e]
        rows = slice(e * INNER, (e + 1) * INNER)
        hidden = self.activation(x @ weights.w1[rows].t())
        if self.gated:
            hidden = hidden * (x @ weights.v1[rows].t())
        return hidden @ weights.w2[rows]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the load-balancing loss of the layer with weight one."""
        scores = self.router.layer(x).softmax(-1)
        gates, expert_ids = scores.topk(self.top_k)
        if self.normalize is not None:
            gates = gates / torch.norm(gates, p=self.normalize, dim=-1, keepdim=True)
        counts = expert_ids.flatten().bincount(minlength=EXPERTS)
        loss = EXPERTS / (TOKENS * self.top_k) * torch.dot(counts.to(scores.dtype), scores.mean(0))
        taken = [0] * EXPERTS
        rows = []
        for t in range(TOKENS):
            row = torch.zeros(HIDDEN)
            for gate, e in zip(gates[t], expert_ids[t].tolist(), strict=True):
                taken[e] += 1
                if taken[e] <= self.capacity:
                    row = row + gate * self.expert(e, x[t])
            rows.append(row)
        return torch.stack(rows), loss


@pytest.fixture(autouse=True)
def double() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


GELU_TANH = functools.partial(F.gelu, approximate="tanh")


@pytest.mark.parametrize(
    ("reference", "options"),
    [
        ({"top_k": 1}, {"activation": "swiglu", "normalize_gates": False}),
        ({"top_k": 2}, {"activation": "swiglu", "normalize_gates": False}),
        ({"top_k": 2, "normalize": 1}, {"activation": "swiglu", "normalize_gates": True}),
        ({"top_k": 2, "activation": GELU_TANH}, {"activation": "geglu_tanh", "normalize_gates": False}),
        ({"top_k": 2, "gated": False, "activation": GELU_TANH}, {"activation": "gelu_tanh", "normalize_gates": False}),
        (
            {"top_k": 2, "gated": False, "activation": F.gelu, "capacity_factor": 1.0},
            {"activation": "gelu", "normalize_gates": False, "capacity_factor": 1.0, "drop": "position"},
        ),
    ],
    ids=["top-1", "top-2", "normalised", "geglu", "mlp", "capacity"],
)
def test_the_same_layer(reference: dict, options: dict) -> None:
    theirs = Layer(**reference)
    ours = MoE(HIDDEN, INNER, EXPERTS, reference["top_k"], **options)
    ours.load_state_dict(from_megablocks(theirs.state_dict()))
    x = torch.randn(TOKENS, HIDDEN)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    y, aux = ours(inputs[0])
    expected, loss = theirs(inputs[1])
    assert_close(y, expected)
    # Ours is K where the load is even, whatever K is.
    assert_close(aux.load_balancing_loss / reference["top_k"], loss, check_dtype=False, rtol=1e-6, atol=0)
    if "capacity_factor" in reference:
        assert aux.dropped_share > 0
    factor = torch.randn_like(y)
    for output in (y, expected):
        (output * factor).sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad)
    gradients = from_megablocks({name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[name], msg=lambda text, name=name: f"{name}: {text}")


def test_dbrx() -> None:
    """The block of transformers' DBRX, which was trained with MegaBlocks."""
    pytest.importorskip("transformers")
    from transformers import DbrxConfig
    from transformers.models.dbrx.modeling_dbrx import DbrxFFN

    ffn = {
        "hidden_size": HIDDEN,
        "ffn_hidden_size": INNER,
        "moe_num_experts": EXPERTS,
        "moe_top_k": 2,
        "moe_normalize_expert_weights": 1.0,
    }
    theirs = DbrxFFN(DbrxConfig(d_model=HIDDEN, n_heads=2, ffn_config=ffn))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.25)
    ours = MoE(HIDDEN, INNER, EXPERTS, top_k=2, activation="swiglu", normalize_gates=True)
    ours.load_state_dict(from_megablocks(theirs.state_dict()))
    x = torch.randn(2, TOKENS, HIDDEN)
    assert_close(ours(x)[0], theirs(x))


def test_a_whole_model() -> None:
    layers = nn.ModuleDict({"norm": nn.LayerNorm(HIDDEN), "ffn": Layer(2)})
    model = nn.ModuleList([layers, nn.ModuleDict({"ffn": Layer(1, gated=False)})])
    before = model.state_dict()
    before["1.ffn.experts.bias"] = torch.ones(HIDDEN)
    after = from_megablocks(before)
    assert set(after) == {
        *("0.norm.weight", "0.norm.bias", "0.ffn.gate.weight", "0.ffn.experts.gate_up_proj", "0.ffn.experts.down_proj"),
        *("1.ffn.gate.weight", "1.ffn.experts.up_proj", "1.ffn.experts.down_proj", "1.ffn.experts.bias"),
    }
    assert "0.ffn.experts.mlp.w1" in before  # what was given is not changed
    assert after["0.norm.weight"] is before["0.norm.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.clear(), "keys that end in experts.mlp.w1, got none"),
        (lambda d: d.pop("router.layer.weight"), "expected router.layer.weight beside experts.mlp.w1"),
        (lambda d: d.pop("experts.mlp.w2"), "expected experts.mlp.w2 beside experts.mlp.w1"),
        (lambda d: d.update({"experts.mlp.w1": torch.zeros(EXPERTS * INNER - 1, HIDDEN)}), r"got \[47, 16\]"),
        (
            lambda d: d.update({"experts.mlp.w2": torch.zeros(EXPERTS, INNER, 3)}),
            r"rows of 4 experts .* got \[4, 12, 3\]",
        ),
        (lambda d: d.update({"experts.mlp.v1": torch.zeros(HIDDEN)}), r"expected experts.mlp.v1 .* got \[16\]"),
    ],
    ids=["nothing", "router", "w2", "rows", "hidden", "vector"],
)
def test_bad_state_dict(change: Callable[[dict], object], message: str) -> None:
    state_dict = Layer(2).state_dict()
    change(state_dict)
    with pytest.raises(ValueError, match=message):
        from_megablocks(state_dict)
