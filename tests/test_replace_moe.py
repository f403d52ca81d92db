"""`replace_moe` on models as they are: transformers' own code and blocks as people write them."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scattermoe
from scattermoe.replace import CannotReplace, registry, stacked
from tests.modes import Calls
from tests.processes import run_processes
from tests.tolerances import model_bound, relative_error

HIDDEN, INNER, EXPERTS = 16, 24, 6


# ---- Blocks that loop over their experts, as they are found in the wild ----------------------------------------------


class Gated(nn.Module):
    """An expert of Mixtral: w1 the gate, w3 the values, w2 down."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu, inner: int = INNER, bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, inner, bias=bias)
        self.w2 = nn.Linear(inner, HIDDEN, bias=bias)
        self.w3 = nn.Linear(HIDDEN, inner, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class ProjNamed(nn.Module):
    """An expert of Qwen or DeepSeek, as wide inside as outside: shapes do not tell the layers apart."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(HIDDEN, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, HIDDEN)
        self.gate_proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, INNER), nn.ReLU(), nn.Linear(INNER, HIDDEN))


class Loop(nn.Module):
    """Softmax over all experts, the best two, renormalised; subclasses change what is around the experts."""

    def __init__(self, make: Callable[[], nn.Module] = Gated, top_k: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(make() for _ in range(EXPERTS))
        self.top_k = top_k

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        gates, ids = self.router(tokens).softmax(-1).topk(self.top_k)
        return gates / gates.sum(-1, keepdim=True), ids

    def mix(self, tokens: Tensor) -> Tensor:
        gates, ids = self.choose(tokens)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, choice = torch.where(ids == index)
            y = y.index_add(0, token, gates[token, choice, None] * expert(tokens[token]))
        return y

    def forward(self, x: Tensor) -> Any:
        return self.mix(x.flatten(0, -2)).view_as(x)


class MixtralLoop(Loop):
    """Returns its router's logits, too; softmax after the choice is the same as renormalising."""

    def forward(self, x: Tensor) -> Any:
        tokens = x.view(-1, x.size(-1))
        logits = self.router(tokens)
        best, ids = logits.topk(self.top_k)
        self_gates = best.softmax(-1, dtype=torch.float32).to(x.dtype)
        y = torch.zeros_like(tokens)
        mask = F.one_hot(ids, EXPERTS).permute(2, 1, 0)
        for index in range(EXPERTS):
            choice, token = torch.where(mask[index])
            y.index_add_(0, token, self.experts[index](tokens[token]) * self_gates[token, choice, None])
        return y.view_as(x), logits


class SwitchLoop(Loop):
    """One expert for each token, its gate as the softmax gives it."""

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        gate, ids = self.router(tokens).softmax(-1).max(-1, keepdim=True)
        return gate, ids


class SigmoidLoop(Loop):
    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.router(tokens).sigmoid().topk(self.top_k)


class SharedLoop(Loop):
    """Qwen2-MoE: a shared expert behind a gate of its own."""

    def __init__(self, make: Callable[[], nn.Module] = Gated, top_k: int = 4, gate: bool = True) -> None:
        super().__init__(make, top_k)
        self.shared_expert = Gated(inner=40)
        self.shared_gate = nn.Linear(HIDDEN, 1) if gate else None

    def mix(self, tokens: Tensor) -> Tensor:
        shared = self.shared_expert(tokens)
        if self.shared_gate is not None:
            shared = torch.sigmoid(self.shared_gate(tokens)) * shared
        return super().mix(tokens) + shared


class GroupRouter(nn.Module):
    """DeepSeek-V3 in small: sigmoid scores, a bias for choosing, scaled gates; wants [B, S, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.register_buffer("bias", torch.randn(EXPERTS) * 0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        _, _, hidden_size = x.shape
        scores = F.linear(x.view(-1, hidden_size).float(), self.weight.float()).sigmoid()
        ids = (scores + self.bias).topk(3, sorted=False)[1]
        gates = scores.gather(1, ids)
        return ids, 2.5 * gates / gates.sum(-1, keepdim=True), None


class DeepSeekLoop(Loop):
    def __init__(self, make: Callable[[], nn.Module] = ProjNamed) -> None:
        super().__init__(make)
        self.router = GroupRouter()

    def forward(self, x: Tensor) -> Any:
        ids, gates, _ = self.router(x)
        self_choice = lambda tokens: (gates.to(x.dtype), ids)  # noqa: E731
        tokens = x.flatten(0, -2)
        gates, ids = self_choice(tokens)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, choice = torch.where(ids == index)
            y = y.index_add(0, token, gates[token, choice, None] * expert(tokens[token]))
        return y.view_as(x)


class DictLoop(Loop):
    """Experts in a dictionary, under names."""

    def __init__(self) -> None:
        super().__init__(plain)
        self.experts = nn.ModuleDict({f"expert_{index}": plain() for index in range(EXPERTS)})

    def mix(self, tokens: Tensor) -> Tensor:
        gates, ids = self.choose(tokens)
        dense = torch.stack([expert(tokens) for expert in self.experts.values()], dim=1)
        return (gates.unsqueeze(-1) * dense.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.size(-1)))).sum(1)


LOOPS: dict[str, Callable[[], nn.Module]] = {
    "w1 w2 w3": Loop,
    "gelu, biases": lambda: Loop(lambda: Gated(F.gelu, bias=True)),
    "mixtral": MixtralLoop,
    "switch": lambda: SwitchLoop(plain, top_k=1),
    "sigmoid": lambda: SigmoidLoop(ProjNamed, top_k=3),
    "shared": SharedLoop,
    "shared, no gate": lambda: SharedLoop(gate=False),
    "deepseek": DeepSeekLoop,
    "dictionary": DictLoop,
    "all experts": lambda: Loop(top_k=EXPERTS),
}


class Net(nn.Module):
    """Two blocks with residual connections."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.blocks = nn.ModuleList(make() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(self.norm(x))
            x = x + (y[0] if isinstance(y, tuple) else y)
        return x


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient under the keys of the state dict."""
    twin = copy.deepcopy(model)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        ours.data = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad.clone()
    return {name: value.clone() for name, value in twin.state_dict().items()}


def assert_same(model: nn.Module, swapped: nn.Module, x: Tensor) -> None:
    """Outputs, input gradient and every parameter's gradient."""
    results = []
    for net in (model, swapped):
        net.zero_grad()
        leaf = x.clone().requires_grad_()
        with Calls() as calls:
            y = net(leaf)
            y.square().mean().backward()
        results.append(({"y": y.detach(), "x": leaf.grad, **gradients(net)}, bool(calls.seen)))
    (want, before), (got, after) = results
    assert want.keys() == got.keys() and not before and after
    wrong = {name: relative_error(got[name], want[name]) for name in want}
    assert all(error <= model_bound(HIDDEN, 2) for error in wrong.values()), wrong


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that says whether a model was touched: classes, attributes and weights."""
    return {
        name: (id(module), type(module), list(module.__dict__), list(module._modules), list(module._parameters.items()))
        for name, module in model.named_modules()
    } | {f"{name}=": value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.endswith("="):
            assert torch.equal(value, after[name])
        else:
            assert value[:4] == after[name][:4], name
            assert all(a is b for (_, a), (_, b) in zip(value[4], after[name][4], strict=True)), name


@pytest.mark.parametrize("kind", LOOPS)
def test_loops(kind: str, device: str) -> None:
    model = Net(LOOPS[kind]).to(device)
    swapped = copy.deepcopy(model)
    report = scattermoe.replace_moe(swapped)
    assert [entry.path for entry in report.replaced] == ["blocks.0", "blocks.1"] and not report.left
    assert_same(model, swapped, torch.randn(2, 9, HIDDEN, device=device))
    if kind == "mixtral":
        torch.testing.assert_close(
            swapped.blocks[0](model.norm(torch.ones(1, 3, HIDDEN, device=device)))[1].shape, (3, EXPERTS)
        )


@pytest.mark.parametrize("kind", ["mixtral", "deepseek", "shared"])
def test_loops_compile_without_a_break(kind: str, device: str, fresh_compiler: None) -> None:
    block = LOOPS[kind]().to(device)
    scattermoe.replace_moe(block)
    x = torch.randn(2, 7, HIDDEN, device=device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", LOOPS)
def test_state_dict_of_loops_both_ways(kind: str, assign: bool) -> None:
    model, other = Net(LOOPS[kind]), Net(LOOPS[kind])
    scattermoe.replace_moe(other)
    assert list(other.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 5, HIDDEN)
    other.load_state_dict(model.state_dict(), assign=assign)
    torch.testing.assert_close(other(x), model(x))
    third = Net(LOOPS[kind])
    third.load_state_dict(other.state_dict(), assign=assign)
    for name, value in model.state_dict().items():
        assert torch.equal(value, third.state_dict()[name])


def test_state_dict_of_stacked_experts_reports_what_is_wrong() -> None:
    model = Loop()
    scattermoe.replace_moe(model)
    state = model.state_dict()
    missing, before = state.pop("experts.2.w1.weight"), model.experts.gate_up_proj.detach().clone()
    state["experts.6.w1.weight"] = missing
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"experts.2.w1.weight".*|Unexpected') as caught:
        model.load_state_dict(state)
    assert "experts.6.w1.weight" in str(caught.value) and "experts.2.w1.weight" in str(caught.value)
    state["experts.3.w2.weight"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for experts.3.w2.weight: expected \[16, 24\], got \[3, 3\]"):
        model.load_state_dict(state, strict=False)
    state["experts.3.w2.weight"] = torch.zeros(HIDDEN, INNER)
    wrong = model.load_state_dict(state, strict=False)
    assert wrong.missing_keys == ["experts.2.w1.weight"] and wrong.unexpected_keys == ["experts.6.w1.weight"]
    assert torch.equal(model.experts.gate_up_proj, before) and model.experts.down_proj[3].eq(0).all()


@pytest.mark.parametrize("kind", ["w1 w2 w3", "dictionary"])
def test_distributed_checkpoint_of_stacked_experts(kind: str, tmp_path: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, other = Net(LOOPS[kind]), Net(LOOPS[kind])
    checkpoint.save(get_model_state_dict(model), checkpoint_id=tmp_path)
    scattermoe.replace_moe(other)
    state = get_model_state_dict(other)
    assert list(state) == list(model.state_dict())
    checkpoint.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(other, state)
    x = torch.randn(2, 5, HIDDEN)
    torch.testing.assert_close(other(x), model(x))


def _shard(rank: int, path: str) -> None:
    from torch import distributed
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Net(Loop)
    original = copy.deepcopy(model)
    scattermoe.replace_moe(model)
    x = torch.randn(2, 5, HIDDEN)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    torch.testing.assert_close(model(x), original(x))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:  # the full state has stacked names; an unsharded swapped model gives the original's
        whole = Net(Loop)
        scattermoe.replace_moe(whole)
        whole.load_state_dict(state)
        original.load_state_dict(whole.state_dict())
        torch.testing.assert_close(original(x), whole(x))
    distributed.destroy_process_group()


def test_fully_sharded_stacked_experts(tmp_path: Path) -> None:
    run_processes(_shard, (str(tmp_path / "store"),), processes=2, deadline=120)


# ---- transformers ----------------------------------------------------------------------------------------------------


def parity() -> Any:
    pytest.importorskip("transformers")
    from tests import parity

    return parity


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_jetmoe(device: str, padding: str | None) -> None:
    harness = parity()
    model = harness.build("jetmoe", device)
    swapped = harness.swapped_copy(model, scattermoe.replace_moe)
    step = harness.assert_same_training_step(model, swapped, harness.batch(model, padding))
    assert step.calls.count("_moe_mlp_forward") == 2, "one mixture of experts a layer"
    assert step.calls.count("parallel_linear") == 4, "queries and outputs of one mixture of attention a layer"


@pytest.mark.parametrize("autocast", [False, True])
def test_jetmoe_in_bfloat16(device: str, autocast: bool) -> None:
    harness = parity()
    model = harness.build("jetmoe", device, torch.float32 if autocast else torch.bfloat16)
    swapped = harness.swapped_copy(model, scattermoe.replace_moe)
    harness.assert_same_training_step(model, swapped, harness.batch(model), torch.bfloat16 if autocast else None)


@pytest.mark.parametrize("name", ["granitemoe", "granitemoehybrid", "granitemoeshared"])
def test_granite(device: str, name: str) -> None:
    harness = parity()
    model = harness.build(name, device)
    reports = []
    swapped = harness.swapped_copy(model, lambda twin: reports.append(scattermoe.replace_moe(twin)))
    assert {entry.note for entry in reports[0].replaced} == {"transformers' experts interface"}
    assert swapped.config._experts_implementation == "scattermoe" and model.config._experts_implementation == "eager"
    harness.assert_same_training_step(model, swapped, harness.batch(model, "left"))
    harness.assert_same_generation(model, swapped)
    swapped.load_state_dict(model.state_dict())
    assert scattermoe.replace_moe(swapped).present == tuple(
        scattermoe.replace.Entry(entry.path, entry.block, "nothing to do") for entry in reports[0].replaced
    )


def test_jetmoe_generates_the_same_tokens_with_a_cache(device: str) -> None:
    harness = parity()
    model = harness.build("jetmoe", device)
    swapped = harness.swapped_copy(model, scattermoe.replace_moe)
    assert harness.assert_same_generation(model, swapped).count("moe_mlp") == 2 * 8


def test_one_call_for_every_model() -> None:
    harness = parity()
    for name in harness.INTERFACE:
        model = harness.build(name)
        report = scattermoe.replace_moe(model)
        assert {entry.note for entry in report.replaced} == {"transformers' experts interface"}, name
    both = nn.ModuleList([harness.build("jetmoe"), harness.build("mixtral"), harness.build("olmoe").model, Loop()])
    report = scattermoe.replace_moe(both)
    assert len(report.replaced) == 4 + 2 + 2 + 1
    assert both[1].config._experts_implementation == both[2].config._experts_implementation == "scattermoe"


def test_jetmoe_keeps_parameters_and_records_router_logits(device: str) -> None:
    harness = parity()
    model = harness.build("jetmoe", device)
    inputs = harness.batch(model, "left")
    want = model(**inputs, output_router_logits=True, output_hidden_states=True)
    parameters = dict(model.named_parameters())
    model.zero_grad()
    report = scattermoe.replace_moe(model)
    assert str(report).splitlines()[:3] == [
        "replaced 2: expert MLPs in one operator",
        "  model.layers.0.mlp (JetMoeMoE)",
        "  model.layers.1.mlp (JetMoeMoE)",
    ]
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    got = model(**inputs, output_router_logits=True, output_hidden_states=True)
    assert len(got.router_logits) == len(want.router_logits) and len(got.hidden_states) == 3
    torch.testing.assert_close(got.router_logits, want.router_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((got.loss, got.aux_loss), (want.loss, want.aux_loss), rtol=1e-5, atol=1e-6)


def test_jetmoe_takes_adapters(device: str) -> None:
    from scattermoe import lora

    harness = parity()
    model = harness.build("jetmoe", device)
    scattermoe.replace_moe(model)
    inputs = harness.batch(model, "left")
    want = model(**inputs).logits
    assert [len(added.targets) for added in lora.add_adapters(model, r=2, targets=["linear"])] == [1] * 8
    torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-4, atol=1e-5)
    for parameter in lora.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    adapted = model(**inputs)
    adapted.loss.backward()
    assert all(parameter.grad.any() for parameter in lora.adapter_parameters(model))
    lora.merge(model)
    torch.testing.assert_close(model(**inputs).logits, adapted.logits, rtol=1e-4, atol=1e-4)
    assert relative_error(adapted.logits, want) > 0.01


def test_jetmoe_compiles_without_a_break(device: str, fresh_compiler: None) -> None:
    harness = parity()
    model = harness.build("jetmoe", device)
    scattermoe.replace_moe(model)
    block, x = model.model.layers[0].mlp, torch.randn(2, 7, 32, device=device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


def test_jetmoe_with_another_activation() -> None:
    harness = parity()
    model = harness.build("jetmoe", activation_function="tanh")
    swapped = harness.swapped_copy(model, scattermoe.replace_moe)
    step = harness.assert_same_training_step(model, swapped, harness.batch(model))
    assert step.calls.count("_moe_mlp_forward") == 0 and step.calls.count("parallel_linear") == 8


def test_models_that_no_type_matches_say_so() -> None:
    doge = pytest.importorskip("transformers.models.doge.modeling_doge")
    config = doge.DogeConfig(hidden_size=16, intermediate_size=8, num_experts=4, num_experts_per_tok=1)
    model = nn.ModuleDict({"mixture": doge.DogeCDMoE(config), "known": Loop()})
    before = snapshot(model)
    with pytest.raises(CannotReplace, match=r"mixture \(DogeCDMoE\): expected a known block type"):
        scattermoe.replace_moe(model)
    assert_untouched(model, before)
    report = scattermoe.replace_moe(model, strict=False)
    assert [entry.path for entry in report.left] == ["mixture"]
    assert [entry.path for entry in report.replaced] == ["known"]
    assert "left 1: expected a known block type" in str(report)


@pytest.mark.parametrize("name", ["llama4_text", "dbrx", "aria_text"])
def test_other_models_without_the_interface(device: str, name: str) -> None:
    harness = parity()
    model = harness.build(name, device)
    swapped = harness.swapped_copy(model, scattermoe.replace_moe)
    harness.assert_same_training_step(model, swapped, harness.batch(model, "left"))
    harness.assert_same_generation(model, swapped)
    swapped.load_state_dict(model.state_dict())
    assert list(swapped.state_dict()) == list(model.state_dict())


def test_fused_experts_of_transformers_without_the_interface(device: str) -> None:
    step = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")
    from types import SimpleNamespace

    config = SimpleNamespace(
        num_local_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=INNER, hidden_act="silu"
    )
    for limit, fused in [(None, True), (0.5, False)]:
        experts = step.Step3p7Experts(config, limit).to(device)
        for parameter in experts.parameters():
            nn.init.normal_(parameter)
        model = FusedNet(experts).to(device)
        swapped = copy.deepcopy(model)
        scattermoe.replace_moe(swapped)
        x = torch.randn(2, 9, HIDDEN, device=device)
        assert_same(model, swapped, x)
        with Calls() as calls:
            swapped(x)
        assert bool(calls.count("_moe_mlp_forward") or calls.count("moe_mlp")) == fused


# ---- Other shapes ----------------------------------------------------------------------------------------------------


class FusedNet(nn.Module):
    """A router that calls fused experts."""

    def __init__(self, experts: nn.Module, gates_first: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = experts
        self.gates_first = gates_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        gates, ids = self.router(tokens).softmax(-1).topk(2)
        return self.experts(tokens, *((gates, ids) if self.gates_first else (ids, gates))).view_as(x)


class TransposedExperts(nn.Module):
    """gpt-oss's layout, gates before ids."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INNER) / 4)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / 4)
        self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x: Tensor, weights: Tensor, selected: Tensor) -> Tensor:
        z = torch.einsum("th,ehf->tef", x, self.gate_up_proj) + self.gate_up_proj_bias
        gate, up = z[..., ::2].clamp(max=7.0), z[..., 1::2].clamp(-7.0, 7.0)
        y = torch.einsum("tef,efh->teh", (up + 1) * gate * torch.sigmoid(1.702 * gate), self.down_proj)
        y = (y + self.down_proj_bias).gather(1, selected.unsqueeze(-1).expand(-1, -1, x.size(-1)))
        return (weights.unsqueeze(-1) * y).sum(1)


class PlainExperts(nn.Module):
    """Square weights: only the numbers tell [E, out, in] from [E, in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / 4)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / 4)

    def forward(self, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        y = F.relu(torch.einsum("th,ehf->tef", hidden, self.up_proj)).square()
        y = torch.einsum("tef,efh->teh", y, self.down_proj)
        return (gates.unsqueeze(-1) * y.gather(1, ids.unsqueeze(-1).expand(-1, -1, hidden.size(-1)))).sum(1)


@pytest.mark.parametrize(("experts", "gates_first"), [(TransposedExperts, True), (PlainExperts, False)])
def test_fused_experts(device: str, experts: type[nn.Module], gates_first: bool) -> None:
    model = FusedNet(experts(), gates_first).to(device)
    swapped = copy.deepcopy(model)
    parameters = dict(swapped.named_parameters())
    scattermoe.replace_moe(swapped)
    assert all(parameter is parameters[name] for name, parameter in swapped.named_parameters())
    assert_same(model, swapped, torch.randn(2, 9, HIDDEN, device=device))
    swapped.load_state_dict(model.state_dict())
    model.load_state_dict(swapped.state_dict())


class TheirParallelExperts(nn.Module):
    """ScatterMoE 0.3's signature; a loop inside."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, outputs, inputs) / 4)
        self.num_experts, self.input_size, self.output_size = EXPERTS, inputs, outputs

    def forward(
        self, inputs, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets, gates=None, grouped_in=False,
        grouped_out=False,
    ):  # fmt: skip
        rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
        rows = torch.einsum("si,soi->so", rows, self.weight[sorted_expert_idxs])
        if grouped_out:
            return rows
        rows = torch.zeros_like(rows).index_add(0, sorted_scattered_idxs, rows)
        return rows if gates is None else (rows.view(*gates.shape, -1) * gates.unsqueeze(-1)).sum(1)


class TheirGLUMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = TheirParallelExperts(HIDDEN, 2 * INNER)
        self.output_experts = TheirParallelExperts(INNER, HIDDEN)
        self.num_experts, self.top_k, self.activation = EXPERTS, 2, nn.SiLU()

    def forward(self, x, expert_p, expert_idxs):
        ids, order = expert_idxs.flatten().sort(stable=True)
        ends = ids.bincount(minlength=EXPERTS).cumsum(0)
        h, gates = self.experts(x, 2, ids, order, ends, grouped_out=True).chunk(2, dim=-1)
        return self.output_experts(self.activation(gates) * h, 1, ids, order, ends, gates=expert_p, grouped_in=True)


def test_copies_of_scattermoe(device: str) -> None:
    model = FusedNet(TheirGLUMLP(), gates_first=True).to(device)
    swapped = copy.deepcopy(model)
    report = scattermoe.replace_moe(swapped)
    assert [(entry.path, entry.note) for entry in report.replaced] == [("experts", "MLP and GLUMLP")]
    assert_same(model, swapped, torch.randn(2, 9, HIDDEN, device=device))
    with Calls() as calls:
        swapped(torch.randn(2, 9, HIDDEN, device=device))
    assert not calls.count("parallel_linear"), "the fused operator"
    alone = nn.ModuleDict({"layer": TheirParallelExperts(HIDDEN, 8)}).to(device)
    order = scattermoe.flatten_sort_count(torch.randint(EXPERTS, (5, 2), device=device), EXPERTS)
    x = torch.randn(5, HIDDEN, device=device)
    want = alone["layer"](x, 2, *order)
    assert scattermoe.replace_moe(alone).replaced[0].note == "ParallelExperts"
    torch.testing.assert_close(alone["layer"](x, 2, *order), want, rtol=1e-4, atol=1e-5)


def test_our_own_modules_are_left_alone() -> None:
    model = nn.ModuleList(
        [scattermoe.MoE(8, 8, 4, 2), scattermoe.MixtureOfAttention(8, 4, 2, 1, 8), scattermoe.MLP(8, 8, 4, 2)]
    )
    before = snapshot(model)
    report = scattermoe.replace_moe(model)
    assert [entry.block for entry in report.present] == ["MoE", "MixtureOfAttention", "MLP"]
    assert_untouched(model, before)


# ---- What stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["w1 w2 w3", "jetmoe"])
def test_dtype_training_mode_frozen_weights_and_hooks_stay(device: str, kind: str) -> None:
    model = parity().build("jetmoe") if kind == "jetmoe" else Net(Loop)
    model = model.to(device, torch.float64)
    path = "model.layers.1.mlp" if kind == "jetmoe" else "blocks.1"
    frozen = "output_linear" if kind == "jetmoe" else "w2"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    block = model.get_submodule(path)
    block.eval()
    model.get_submodule(path.replace("1", "0")).train()
    block.marker = "mine"
    seen: list[str] = []
    handle = block.register_forward_hook(lambda *_: seen.append("forward"))
    grads = {name: parameter.requires_grad for name, parameter in model.state_dict(keep_vars=True).items()}
    scattermoe.replace_moe(model)
    assert model.get_submodule(path) is block and block.marker == "mine" and isinstance(block, type(block))
    assert {name: value.requires_grad for name, value in model.state_dict(keep_vars=True).items()} == grads
    assert not any(module.training for module in block.modules())
    assert all(module.training for module in model.get_submodule(path.replace("1", "0")).modules())
    assert all(p.dtype == torch.float64 and p.device.type == device for p in block.parameters())
    x = torch.randn(2, 3, 32 if kind == "jetmoe" else HIDDEN, device=device, dtype=torch.float64)
    assert block(x).dtype == torch.float64 and seen == ["forward"]
    handle.remove()
    block(x)
    assert seen == ["forward"]


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", ["w1 w2 w3", "jetmoe"])
def test_copies(kind: str, copier: str) -> None:
    model = parity().build("jetmoe").model.layers[0].mlp if kind == "jetmoe" else Net(Loop)
    scattermoe.replace_moe(model)
    if copier == "deepcopy":
        twin = copy.deepcopy(model)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = torch.randn(2, 3, 32 if kind == "jetmoe" else HIDDEN)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    assert type(twin) is type(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not model(x).eq(x if kind != "jetmoe" else 0).all(), "the copy has weights of its own"


def test_a_block_in_two_places_and_a_block_without_a_parent() -> None:
    block = Loop()
    model = nn.Sequential(nn.Sequential(block), nn.Tanh(), block)
    x = torch.randn(4, HIDDEN)
    want = model(x)
    assert [entry.path for entry in scattermoe.replace_moe(model).replaced] == ["0.0"]
    assert model[0][0] is model[2] is block
    torch.testing.assert_close(model(x), want)
    alone = Loop()
    want = alone(x)
    assert str(scattermoe.replace_moe(alone)).endswith("the model itself (Loop)")
    torch.testing.assert_close(alone(x), want)


def test_a_router_in_float32_and_named_arguments() -> None:
    model = Loop().bfloat16()
    model.router.float()

    class Upcasting(Loop):
        def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
            gates, ids = super().choose(tokens.float())
            return gates.to(tokens.dtype), ids

    model.__class__ = Upcasting
    x = torch.randn(6, HIDDEN).bfloat16()
    want = model(x=x)
    scattermoe.replace_moe(model)
    torch.testing.assert_close(model(x=x), want, rtol=2e-2, atol=2e-2)


def test_meta_device_and_zero_weights() -> None:
    model = Loop()
    nn.init.zeros_(model.experts[0].w2.weight)
    nn.init.zeros_(model.router.weight)
    with torch.device("meta"):
        twin = Loop()
    scattermoe.replace_moe(twin)
    assert all(parameter.is_meta for parameter in twin.parameters())
    part = {name: value for name, value in model.state_dict().items() if not name.startswith("experts.2.w2")}
    assert twin.load_state_dict(part, strict=False, assign=True).missing_keys == ["experts.2.w2.weight"]
    assert twin.experts.down_proj.is_meta and not twin.experts.gate_up_proj.is_meta
    twin.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(5, HIDDEN)
    scattermoe.replace_moe(model)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)


def test_random_numbers_are_left_alone() -> None:
    model = Net(Loop)
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    scattermoe.replace_moe(model)
    assert torch.equal(torch.rand(3), want)


def test_stacked_weights_take_no_second_copy() -> None:
    model = Loop()
    single = model.experts[1].w3.weight
    scattermoe.replace_moe(model)
    stacked_weight = model.experts.gate_up_proj
    assert single.untyped_storage().data_ptr() == stacked_weight.untyped_storage().data_ptr()


def test_gradients_of_stacked_weights_stay() -> None:
    model, x = Loop(top_k=1), torch.randn(2, HIDDEN)  # most experts have none
    model(x).sum().backward()
    want = gradients(model)
    scattermoe.replace_moe(model)
    got = gradients(model)
    assert all(torch.equal(got[name], value) for name, value in want.items()) and want["router.weight"].abs().sum() == 0
    model(x).sum().backward()
    torch.testing.assert_close(gradients(model)["experts.0.w1.weight"], 2 * want["experts.0.w1.weight"])


def test_importing_scattermoe_imports_no_transformers() -> None:
    code = "import sys, torch, scattermoe; from torch import nn; scattermoe.replace_moe(scattermoe.MoE(8, 8, 4, 2)); "
    subprocess.run([sys.executable, "-c", code + "sys.exit('transformers' in sys.modules)"], check=True)


# ---- Users' blocks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_block_types", list(registry._block_types))


class Dense(nn.Module):
    """Every expert sees every token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / 4)

    def forward(self, x: Tensor) -> Tensor:
        gates, ids = self.router(x).softmax(-1).topk(2)
        y = torch.einsum("eoi,...i->...eo", self.weight, x)
        return (gates.unsqueeze(-1) * y.gather(-2, ids.unsqueeze(-1).expand(*ids.shape, x.size(-1)))).sum(-2)


class Routed(nn.Module):
    normalize = False

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        gates, ids = scattermoe.topk_gating(self.router(tokens), 2, normalize=self.normalize)
        rows = scattermoe.parallel_linear(tokens, self.weight, scattermoe.route(ids, EXPERTS), grouped_out=True)
        return scattermoe.combine(rows, gates, scattermoe.route(ids, EXPERTS)).view_as(x)


class Wrong(Routed):
    normalize = True


def draw(block: nn.Module) -> Tensor:
    return block(torch.randn(3, HIDDEN))


def test_register_a_class(registrations: None, device: str) -> None:
    scattermoe.register_block(Dense, trial=draw)(Routed)
    model = nn.Sequential(Dense()).to(device)
    swapped = copy.deepcopy(model)
    assert str(scattermoe.replace_moe(swapped)) == "replaced 1: Routed\n  0 (Dense)"
    assert isinstance(swapped[0], Dense) and isinstance(swapped[0], Routed)
    assert_same(model, swapped, torch.randn(2, 9, HIDDEN, device=device))


def test_register_a_function(registrations: None) -> None:
    class Renamed(nn.Module):
        def __init__(self, block: Dense) -> None:
            super().__init__()
            self.gate, self.weight = block.router, block.weight

    @scattermoe.register_block(lambda module: type(module) is Dense, name="renamed")
    def convert(block: Dense) -> nn.Module:
        return Renamed(block)

    model = nn.ModuleDict({"dense": Dense()})
    before = snapshot(model)
    with pytest.raises(
        CannotReplace, match=r"dense \(Dense\): expected a replacement with the block's state dict, .*gate.bias"
    ):
        scattermoe.replace_moe(model)
    assert_untouched(model, before)

    @scattermoe.register_block(Dense)  # the newest one counts
    def moved(block: Dense) -> nn.Module:
        new = Dense()
        new.router, new.weight = block.router, block.weight
        return new

    seen: list[int] = []
    handle = model["dense"].eval().register_forward_pre_hook(lambda *_: seen.append(1))
    block = model["dense"]
    scattermoe.replace_moe(model)
    assert model["dense"] is block and not block.training
    block(torch.randn(1, HIDDEN))
    handle.remove()
    block(torch.randn(1, HIDDEN))
    assert seen == [1]


def test_a_trial_finds_a_wrong_replacement(registrations: None) -> None:
    scattermoe.register_block(Dense, trial=draw)(Wrong)
    model = nn.Sequential(Dense())
    with torch.no_grad():
        model[0].weight.zero_()  # with its own weights nothing would show
    before = snapshot(model)
    with pytest.raises(CannotReplace, match=r"0 \(Dense\): expected the same outputs .* got a relative difference of"):
        scattermoe.replace_moe(model)
    assert_untouched(model, before)


# ---- Blocks that cannot be replaced ----------------------------------------------------------------------------------


class Dropping(Loop):
    """An expert takes no more than a fair share and a half."""

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        gates, ids = super().choose(tokens)
        capacity = int(1.5 * ids.numel() / EXPERTS) + 8
        order = F.one_hot(ids.flatten(), EXPERTS).cumsum(0).gather(1, ids.view(-1, 1)).view_as(ids)
        return gates * (order <= capacity), ids


class Noisy(Loop):
    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return super().choose(tokens * (1 + 0.1 * torch.rand_like(tokens)) if self.training else tokens)


class Counting(Loop):
    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        gates, ids = super().choose(tokens)
        self.load = ids.flatten().bincount(minlength=EXPERTS)
        return gates, ids


class ScaledInput(Loop):
    """Gates on the way in, as Llama 4."""

    def mix(self, tokens: Tensor) -> Tensor:
        gates, ids = self.choose(tokens)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, choice = torch.where(ids == index)
            y = y.index_add(0, token, expert(gates[token, choice, None] * tokens[token]))
        return y


class TwoArguments(Loop):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return super().forward(x if mask is None else x * mask)


class Int8Linear(nn.Linear):
    pass


def _edit(change: Callable[[Loop], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        block = Loop()
        change(block)
        return block

    return make


def _quantise(block: Loop) -> None:
    linear = block.experts[2].w1
    del linear.weight
    linear.weight = nn.Parameter(torch.zeros(INNER, HIDDEN, dtype=torch.int8), requires_grad=False)


def _tie(block: Loop) -> None:
    block.experts[1].w2.weight = block.experts[0].w2.weight


def _wrap(block: Loop) -> None:
    block.experts[3].w3 = Int8Linear(HIDDEN, INNER, bias=False)


BAD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "drops tokens": (Dropping, "one of the known rules .* in evaluation mode"),
    "noise in training": (Noisy, "in training mode, got a relative difference"),
    "dropout in training": (lambda: Loop(lambda: nn.Sequential(*plain(), nn.Dropout(0.5))), "the same in training"),
    "leaves the load behind": (Counting, "changes no attribute of the block, got one that sets load"),
    "gates on the way in": (ScaledInput, "one of the known rules"),
    "unknown activation": (
        lambda: Loop(lambda: Gated(F.mish)),
        r"expected experts down\(act\(gate\(x\)\) \* up\(x\)\)",
    ),
    "one expert's activation": (_edit(lambda b: setattr(b.experts[4], "act", F.gelu)), "one formula, got a experts.4"),
    "one expert's width": (_edit(lambda b: b.experts.__setitem__(5, Gated(inner=8))), "one shape, got a experts.5"),
    "no router": (_edit(lambda b: delattr(b, "router")), "no router that fits"),
    "router for fewer experts": (_edit(lambda b: setattr(b, "router", nn.Linear(HIDDEN, 4))), "no router that fits"),
    "frozen in part": (
        _edit(lambda b: b.experts[1].w1.weight.requires_grad_(False)),
        "one requires_grad for all experts, got True and False as experts.1.w1.weight",
    ),
    "frozen in half": (
        _edit(lambda b: [expert.w1.requires_grad_(False) for expert in b.experts]),
        "one requires_grad and one dtype for w1.weight and w3.weight",
    ),
    "dtype in part": (_edit(lambda b: b.experts[1].half()), "one dtype for all experts"),
    "quantised": (_edit(_quantise), "floating weights, got torch.int8 as experts.2.w1.weight"),
    "other layers": (_edit(_wrap), "plain nn.Linear layers, got a Int8Linear as experts.3.w3"),
    "shared weights": (_edit(_tie), "weights of each expert's own in experts and no others"),
    "hooks inside": (
        _edit(lambda b: b.experts[0].w1.register_forward_hook(lambda *_: None)),
        r"no hooks on experts.0.w1 and no forward of its own",
    ),
    "hooks on the list": (
        _edit(lambda b: b.experts.register_forward_pre_hook(lambda *_: None)),
        "no hooks on experts and no forward of its own",
    ),
    "forward inside": (
        _edit(lambda b: setattr(b.experts[3], "forward", b.experts[3].forward)),
        "no hooks on experts.3 and no forward of its own",
    ),
    "buffers inside": (
        _edit(lambda b: b.experts[0].register_buffer("seen", torch.zeros(1))),
        "experts without buffers",
    ),
    "a second argument": (TwoArguments, r"a forward of the tokens alone, got \(x: .*mask"),
    "forward of its own": (
        _edit(lambda b: setattr(b, "forward", b.forward)),
        "expected the forward of the block's class",
    ),
    "more parameters": (
        lambda: Loop(lambda: nn.Sequential(nn.LayerNorm(HIDDEN), *plain())),
        "two or three linear layers and no other parameters in experts.0",
    ),
    "cannot be copied": (_edit(lambda b: setattr(b, "handle", open("/dev/null"))), "can be copied for a trial run"),  # noqa: SIM115
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_replaced_is_left_with_its_reason(kind: str) -> None:
    make, reason = BAD[kind]
    model = nn.ModuleDict({"good": Loop(), "deep": nn.ModuleList([nn.Identity(), make()])})
    before = snapshot(model)
    with pytest.raises(CannotReplace, match=rf"(?s)changed none:.*deep\.1 \(\w+\): .*{reason}"):
        scattermoe.replace_moe(model)
    assert_untouched(model, before)
    report = scattermoe.replace_moe(model, strict=False)
    assert [entry.path for entry in report.replaced] == ["good"] and [entry.path for entry in report.left] == ["deep.1"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: delattr(block.router, "top_k"), "router.top_k"),
        (lambda block: delattr(block, "activation"), "an attribute activation"),
        (lambda block: setattr(block.router, "num_experts", 5), r"input_linear.weight of shape \[5, out, in\]"),
        (lambda block: block.input_linear.register_parameter("bias", nn.Parameter(torch.ones(4))), "and no bias"),
        (lambda block: setattr(block.router, "top_k", 9), "a block that runs"),
        (lambda block: block.output_linear.register_forward_hook(lambda *_: None), "no hooks on output_linear"),
    ],
)
def test_jetmoe_with_something_missing(change: Callable[[nn.Module], Any], reason: str) -> None:
    model = parity().build("jetmoe")
    change(model.model.layers[1].mlp)
    before = snapshot(model)
    with pytest.raises(CannotReplace, match=rf"model.layers.1.mlp \(JetMoeMoE\): expected .*{reason}"):
        scattermoe.replace_moe(model)
    assert_untouched(model, before)


def test_experts_that_are_elsewhere_too() -> None:
    twice = nn.ModuleList([Loop(), Loop()])
    twice[1].experts = twice[0].experts
    with pytest.raises(CannotReplace, match=r"(?s)  0 \(Loop\): .* as 1.experts\n  1 \(Loop\): .* as 0.experts"):
        scattermoe.replace_moe(twice)
    tied = nn.ModuleDict({"block": Loop(), "head": nn.Linear(INNER, HIDDEN, bias=False)})
    tied["block"].experts[3].w2.weight = tied["head"].weight
    report = scattermoe.replace_moe(tied, strict=False)
    assert report.left[0].path == "block" and report.left[0].note.endswith("as head") and type(tied["block"]) is Loop
    inner = Loop()
    inner.first = inner.experts[0]
    with pytest.raises(CannotReplace, match=r"the model itself \(Loop\)"):
        scattermoe.replace_moe(inner)


def test_quantised_experts_of_the_interface() -> None:
    model = parity().build("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        CannotReplace,
        match=r"model.layers.0.mlp.experts \(MixtralExperts\): down_proj is quantised \(torch.float8_e4m3fn\)",
    ):
        scattermoe.replace_moe(model)
    assert model.config._experts_implementation == "eager"


def test_models_without_a_mixture_of_experts() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    with pytest.raises(CannotReplace, match="it has no mixture-of-experts block that is known"):
        scattermoe.replace_moe(model)
    assert str(scattermoe.replace_moe(model, strict=False)) == "no mixture-of-experts block found"


def test_an_error_on_the_way_undoes_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([Loop(), Loop(plain)])
    x = torch.randn(4, HIDDEN)
    before, want = snapshot(model), [block(x) for block in model]
    take_weights, done = stacked.StackedExperts.take_weights, []

    def second_fails(self: stacked.StackedExperts) -> None:
        if done:
            raise MemoryError("no room")
        done.append(self)
        take_weights(self)

    monkeypatch.setattr(stacked.StackedExperts, "take_weights", second_fails)
    with pytest.raises(MemoryError):
        scattermoe.replace_moe(model)
    assert len(done) == 1
    assert_untouched(model, before)
    torch.testing.assert_close([block(x) for block in model], want, rtol=0, atol=0)


def test_the_report_stays_short() -> None:
    model = nn.ModuleList(scattermoe.MoE(8, 8, 4, 2) for _ in range(9))
    assert str(scattermoe.replace_moe(model)).splitlines() == [
        "on scattermoe already 9: nothing to do",
        "  0 (MoE)",
        "  1 (MoE)",
        "  2 (MoE)",
        "  and 6 more, the last 8 (MoE)",
    ]
