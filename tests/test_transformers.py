"""The experts implementation "scattermoe": every kind of experts module, what is refused and how, and the tools around it."""

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
from transformers.activations import ACT2FN  # noqa: E402  (after the check that transformers is there)
from transformers.integrations import use_experts_implementation  # noqa: E402

import scattermoe.transformers  # noqa: E402
from tests import parity  # noqa: E402
from tests.modes import Calls  # noqa: E402
from tests.tolerances import model_bound, relative_error  # noqa: E402

EXPERTS, HIDDEN, WIDTH, TOKENS, TOP_K = 5, 12, 8, 17, 3


def make_experts(
    act: Callable[[Tensor], Tensor] | None = None,
    gate: Callable[[Any, Tensor], Tensor] | None = None,
    **kind: bool,
) -> nn.Module:
    """An experts module of a class that a model could have defined, with random weights."""
    has_gate, has_bias = kind.get("has_gate", True), kind.get("has_bias", False)
    transposed = kind.get("is_transposed", False)
    up_name = "gate_up_proj" if has_gate else "up_proj"
    rows = 2 * WIDTH if has_gate else WIDTH

    def weight(out: int, inner: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(EXPERTS, *((inner, out) if transposed else (out, inner))) / inner**0.5)

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = EXPERTS
            self.act_fn = nn.SiLU() if act is None else act
            self.register_parameter(up_name, weight(rows, HIDDEN))
            self.down_proj = weight(HIDDEN, WIDTH)
            if has_bias:
                self.register_parameter(f"{up_name}_bias", nn.Parameter(torch.randn(EXPERTS, rows)))
                self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            y = torch.zeros_like(hidden_states)
            for token, choice in itertools.product(range(top_k_index.size(0)), range(top_k_index.size(1))):
                e = int(top_k_index[token, choice])
                if e == self.num_experts:
                    continue
                up, down = getattr(self, up_name)[e], self.down_proj[e]
                if transposed:
                    up, down = up.T, down.T
                z = F.linear(hidden_states[token], up, getattr(self, f"{up_name}_bias")[e] if has_bias else None)
                h = self._apply_gate(z) if has_gate else self.act_fn(z)
                row = F.linear(h, down, self.down_proj_bias[e] if has_bias else None) * top_k_weights[token, choice]
                y = y.index_add(0, torch.tensor([token], device=y.device), row[None].to(y.dtype))
            return y

    if gate is not None:
        Experts._apply_gate = gate
    return use_experts_implementation(Experts, **kind)(SimpleNamespace(_experts_implementation="eager"))


def inputs(device: str, sentinels: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(TOKENS, HIDDEN, device=device, requires_grad=True)
    gates, ids = torch.rand(TOKENS, EXPERTS, device=device).topk(TOP_K)
    if sentinels:  # as one rank of several gets them: choices of other ranks' experts, tokens without any of ours
        dropped = torch.rand(TOKENS, TOP_K, device=device) < 0.4
        dropped[3] = True
        ids, gates = ids.masked_fill(dropped, EXPERTS), gates.masked_fill(dropped, 0.0)
    return x, ids, gates.detach().requires_grad_()


def results(experts: nn.Module, implementation: str, x: Tensor, ids: Tensor, gates: Tensor) -> list[Tensor]:
    """The output and every gradient on one implementation."""
    experts.config._experts_implementation = implementation
    y = experts(x, ids, gates)
    weight = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad(y, [x, gates, *experts.parameters()], weight)]


def assert_served(experts: nn.Module, device: str, operator: str, sentinels: bool = False) -> None:
    args = inputs(device, sentinels)
    experts = experts.to(device)
    assert scattermoe.transformers.broken_rule(experts) is None
    want = results(experts, "eager", *args)
    with Calls() as calls:
        got = results(experts, "scattermoe", *args)
    # Weights, and the input, have sums over features or a few rows; a parameter of the activation over all that it acts on.
    names = ["y", "x", "gates", *(name for name, _ in experts.named_parameters())]
    for name, ours, theirs in zip(names, got, want, strict=True):
        length = TOKENS * TOP_K * WIDTH if name.startswith("act_fn.") else HIDDEN
        assert relative_error(ours, theirs) <= model_bound(length, 1), name
    assert calls.count(operator) > 0
    assert calls.count("_moe_mlp_forward") + calls.count("combine") == 1, "once, on one path"


def interleaved_gate(self: nn.Module, z: Tensor) -> Tensor:
    return torch.tanh(z[..., ::2]) * (z[..., 1::2] - 1)


KINDS = list(itertools.product([True, False], repeat=3))


@pytest.mark.parametrize("has_gate, has_bias, is_transposed", KINDS)
@pytest.mark.parametrize(
    "act, operator",
    [pytest.param(nn.SiLU(), "_moe_mlp_forward", id="silu"), pytest.param(torch.tanh, "parallel_linear", id="tanh")],
)
def test_every_kind_of_module(
    device: str, has_gate: bool, has_bias: bool, is_transposed: bool, act: Callable, operator: str
) -> None:
    kind = {"has_gate": has_gate, "has_bias": has_bias, "is_transposed": is_transposed}
    assert_served(make_experts(act, **kind), device, operator)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "act, operator",
    [
        pytest.param(nn.GELU(), "_moe_mlp_forward", id="gelu"),
        pytest.param(F.softplus, "parallel_linear", id="softplus"),
    ],
)
def test_ids_of_other_ranks_contribute_nothing(device: str, has_bias: bool, act: Callable, operator: str) -> None:
    # softplus(0) is not 0: the rows of dropped slots must not reach the sum whatever the activation makes of them.
    assert_served(make_experts(act, has_gate=False, has_bias=has_bias), device, operator, sentinels=True)


@pytest.mark.parametrize("act", [nn.SiLU(), torch.tanh], ids=["silu", "tanh"])
def test_autocast_returns_the_dtype_that_came_in(device: str, act: Callable) -> None:
    experts, (x, ids, gates) = make_experts(act).to(device), inputs(device)
    with torch.autocast(device, torch.bfloat16):
        for implementation in ("eager", "scattermoe"):
            y, *gradients = results(experts, implementation, x, ids, gates)
            assert {tensor.dtype for tensor in (y, *gradients)} == {torch.float32}, implementation


def test_own_gate_runs_between_scattered_layers(device: str) -> None:
    experts = make_experts(gate=interleaved_gate, is_concatenated=False, has_bias=True)
    assert_served(experts, device, "parallel_linear", sentinels=True)


FUSED = ["silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "relu"]


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("name", ACT2FN)
def test_every_activation_of_transformers(name: str, has_gate: bool) -> None:
    act = ACT2FN[name]
    fused = name in FUSED or (not has_gate and name in ("relu2", "linear"))
    experts = make_experts(act, has_gate=has_gate)
    assert_served(experts.float(), "cpu", "_moe_mlp_forward" if fused else "parallel_linear")


@pytest.mark.parametrize("name", ["gpt_oss", "openai_privacy_filter", "minimax_m3_vl"])
def test_clamped_gates_keep_their_alpha_and_limit(device: str, name: str) -> None:
    modeling = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    kind = next(value for key, value in vars(modeling).items() if key.endswith("Experts"))
    config = SimpleNamespace(
        num_local_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        swiglu_alpha=0.9,
        swiglu_limit=0.6,
        _experts_implementation="eager",
    )
    experts = kind(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    if hasattr(experts, "alpha"):
        experts.alpha, experts.limit = 0.9, 0.6
    assert_served(experts, device, "_moe_mlp_forward")


def test_a_subclass_with_a_gate_of_its_own_is_not_taken_for_its_parent(device: str) -> None:
    modeling = transformers.models.gpt_oss.modeling_gpt_oss

    class Experts(modeling.GptOssExperts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            return super()._apply_gate(gate_up) + 1

    config = parity.config("gpt_oss", hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS)
    experts = Experts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    assert_served(experts, device, "parallel_linear")


# ---- Refusals ------------------------------------------------------------------------------------------------------------

PATH = "model.layers.1.mlp.experts"


def quantised(experts: nn.Module) -> None:
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)


def packed(experts: nn.Module) -> None:
    class Packed(nn.Parameter):
        pass

    experts.down_proj = Packed(experts.down_proj.detach())


def without_weight(experts: nn.Module) -> None:
    del experts.down_proj


def without_bias(experts: nn.Module) -> None:
    experts.has_bias = True


def without_activation(experts: nn.Module) -> None:
    experts.act_fn = None


def not_gated(experts: nn.Module) -> None:
    experts.has_gate = False


def wrong_count(experts: nn.Module) -> None:
    experts.num_experts += 1


def wrong_layout(experts: nn.Module) -> None:
    experts.is_transposed = True


def wrong_shape(experts: nn.Module) -> None:
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().flatten(0, 1))


def two_layouts(experts: nn.Module) -> None:
    experts.is_concatenated = False


REFUSALS = {
    quantised: r"gate_up_proj is quantised \(torch.float8_e4m3fn\); weights must be float64, float32, bfloat16 or float16",
    packed: r"down_proj is quantised \(Packed of torch.float32\)",
    without_weight: "it has no down_proj",
    without_bias: "it has no gate_up_proj_bias",
    without_activation: "its activation act_fn is missing or cannot be called",
    not_gated: "it has no up_proj",
    wrong_count: "num_experts is 5, but gate_up_proj has 4 and down_proj 4",
    wrong_layout: "gate_up_proj gives 32 values, which does not fit the 32 that down_proj takes",
    wrong_shape: r"gate_up_proj must be \[experts, out, in\] or transposed, got shape",
    two_layouts: "is_concatenated=False says that gate and up rows are interleaved",
}


@pytest.mark.parametrize("break_it", REFUSALS, ids=lambda function: function.__name__)
def test_a_module_that_cannot_be_served(break_it: Callable[[nn.Module], None]) -> None:
    model = parity.build("mixtral")
    break_it(model.get_submodule(PATH))
    before = {key: (value.data_ptr(), value.shape) for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"^{PATH} \(MixtralExperts\) cannot run on scattermoe: {REFUSALS[break_it]}"):
        model.set_experts_implementation("scattermoe")
    assert model.get_experts_implementation() == {"": "eager"}
    assert model.model.config._experts_implementation == "eager"
    assert {key: (value.data_ptr(), value.shape) for key, value in model.state_dict().items()} == before


@pytest.mark.parametrize("name", ["jetmoe", "llama"])
def test_a_model_outside_the_interface(name: str) -> None:
    config = parity.config("jetmoe") if name == "jetmoe" else transformers.LlamaConfig(hidden_size=32, vocab_size=8)
    config.num_hidden_layers = 1
    model = transformers.AutoModelForCausalLM.from_config(config)
    message = (
        f"^{type(model).__name__} cannot run on scattermoe: none of its modules takes transformers' experts interface"
    )
    before = model.get_experts_implementation()
    with pytest.raises(ValueError, match=message):
        model.set_experts_implementation("scattermoe")
    assert model.get_experts_implementation() == before
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_config(config, experts_implementation="scattermoe")


def test_a_submodel_alone_can_be_chosen_and_refused() -> None:
    config = transformers.Qwen3VLMoeConfig(
        text_config={
            **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 8},
            **{"num_experts": 4, "num_experts_per_tok": 2},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    )
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    model.set_experts_implementation({"text_config": "scattermoe"})
    assert model.config.text_config._experts_implementation == "scattermoe"
    model.set_experts_implementation("eager")
    assert model.config.text_config._experts_implementation == "eager"
    model.model.language_model.layers[0].mlp.experts.num_experts = 3
    with pytest.raises(ValueError, match=r"^model.language_model.layers.0.mlp.experts .* num_experts is 3"):
        model.set_experts_implementation("scattermoe")
    assert "scattermoe" not in model.get_experts_implementation().values()


# ---- Loading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_from_pretrained(tmp_path: Path, device: str, name: str) -> None:
    model = parity.build(name, device)
    model.save_pretrained(tmp_path)
    options = {"attn_implementation": "eager", "experts_implementation": "scattermoe"}
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    parity.assert_same_training_step(model, loaded.to(device), parity.batch(model))
    loaded.save_pretrained(tmp_path / "again")  # what was trained on our experts goes back to everybody else's
    back = type(model).from_pretrained(tmp_path / "again", attn_implementation="eager", experts_implementation="eager")
    for key, value in back.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].cpu()), key
    assert "scattermoe" not in (tmp_path / "again" / "config.json").read_text()


def test_from_pretrained_refuses(tmp_path: Path) -> None:
    model = parity.build("jetmoe")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="JetMoeForCausalLM cannot run on scattermoe"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="scattermoe")


ABSENT = "sys.modules['transformers'] = None"
OLD = "import transformers; transformers.__version__ = '5.4.2'"


@pytest.mark.parametrize("condition", [ABSENT, OLD], ids=["absent", "old"])
def test_transformers_is_optional(condition: str) -> None:
    code = (
        f"import scattermoe, sys; assert 'transformers' not in sys.modules; {condition}; import scattermoe.transformers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    message = "ImportError: scattermoe.transformers needs transformers 5.8 or newer: pip install 'transformers>=5.8'"
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == message


# ---- Tools --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "own gate"])
def test_compiled_block(device: str, name: str) -> None:
    if name == "own gate":
        experts = make_experts(gate=interleaved_gate, is_concatenated=False, has_bias=True).to(device)
    else:
        sizes = {"hidden_size": HIDDEN, "num_attention_heads": 2, "num_key_value_heads": 2}
        model = parity.build(name, device, **sizes, intermediate_size=WIDTH)
        experts = next(module for module in model.modules() if hasattr(module, "is_concatenated"))
    compiled = torch.compile(copy.deepcopy(experts), fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (TOKENS, 4):
        x, ids, gates = (tensor[:tokens] for tensor in inputs(device))
        ids = ids % experts.num_experts
        got = results(compiled, "scattermoe", x, ids, gates)
        for ours, theirs in zip(got, results(experts, "scattermoe", x, ids, gates), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_trainer(tmp_path: Path, device: str) -> None:
    pytest.importorskip("accelerate")
    model = parity.build("mixtral", device)
    model.set_experts_implementation("scattermoe")
    text = torch.tensor(list(b"the experts of a token are few, and the tokens of an expert many. ")) % parity.VOCABULARY
    windows = text.repeat(4).unfold(0, 24, 5)
    examples = [{"input_ids": window, "labels": window} for window in windows[:48]]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )
    trainer = transformers.Trainer(model=model, args=options, train_dataset=examples)
    with Calls() as calls:
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20 and sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert calls.count("_moe_mlp_backward") == 20 * 2 * len(model.model.layers)
