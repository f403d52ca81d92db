"""The MoE layer: numbers, gradients, checkpoints of other libraries, and the training tools around it."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from scattermoe.experts import Experts
from scattermoe.moe import MoE, MoEAux

PLAIN = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda z: z.clamp(min=0) ** 2,
    "identity": lambda z: z,
}
GATES = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": PLAIN["gelu_tanh"], "reglu": F.relu}


def activate(z: Tensor, activation: str, layout: str, alpha: float, limit: float) -> Tensor:
    """One token's activation, [I] or [2I] -> [I]."""
    if activation in PLAIN:
        return PLAIN[activation](z)
    half = z.numel() // 2
    gate = {"gate_up": z[:half], "up_gate": z[half:], "interleaved": z[0::2]}[layout]
    up = {"gate_up": z[half:], "up_gate": z[:half], "interleaved": z[1::2]}[layout]
    if activation == "swiglu_clamped":
        gate = torch.minimum(gate, torch.tensor(limit, dtype=z.dtype))
        return (up.clamp(-limit, limit) + 1) * gate * (alpha * gate).sigmoid()
    return GATES[activation](gate) * up


def token_by_token(moe: MoE, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The layer as its docstring says it, one token after the other. The router is trusted; it has tests of its own."""
    experts = moe.experts
    up, up_bias = (getattr(experts, experts._up_name + end) for end in ("", "_bias"))
    gates, ids, _ = moe.gate(x)
    rows = []
    for t in range(x.size(0)):
        row = torch.zeros_like(x[t])
        for gate, e in zip(gates[t], ids[t].tolist(), strict=True):
            if mask is not None and not mask[t]:
                continue
            z = up[e] @ x[t] + (0 if up_bias is None else up_bias[e])
            h = activate(z, experts.activation, experts.glu_layout, experts.alpha, experts.limit)
            row = row + gate * (experts.down_proj[e] @ h + (0 if up_bias is None else experts.down_proj_bias[e]))
        shared = moe.shared_expert
        if shared is not None:
            z = shared.up_proj(x[t])
            if shared.gate_proj is not None:
                z = torch.cat((shared.gate_proj(x[t]), z))
            out = shared.down_proj(activate(z, experts.activation, "gate_up", experts.alpha, experts.limit))
            if moe.shared_expert_gate is not None:
                out = out * moe.shared_expert_gate(x[t]).sigmoid()
            row = row + out
        rows.append(row)
    return torch.stack(rows)


def randomise(module: torch.nn.Module, std: float = 0.3) -> None:
    """Also the biases, which start at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)


LAYERS = [
    {},
    {"bias": True, "router_bias": True},
    {"glu_layout": "up_gate", "activation": "geglu"},
    {"glu_layout": "interleaved", "activation": "swiglu_clamped", "bias": True, "alpha": 1.3, "limit": 0.5},
    {"glu_layout": "interleaved", "activation": "reglu"},
    {"activation": "geglu_tanh", "shared_intermediate_size": 5},
    {"activation": "relu2", "bias": True, "shared_intermediate_size": 5, "shared_gate": True},
    {"activation": "swiglu_clamped", "shared_intermediate_size": 5, "shared_gate": True, "bias": True, "limit": 0.5},
    {"activation": "silu"},
    {"activation": "gelu"},
    {"activation": "gelu_tanh"},
    {"activation": "relu"},
    {"activation": "identity"},
    {"scoring": "sigmoid", "selection_bias": True, "num_groups": 2, "top_groups": 1, "scale": 2.5},
    {"normalize_gates": False},
    {"normalize_gates": "detach"},
    {"recompute": True, "bias": True},
]


@pytest.mark.parametrize("options", LAYERS, ids=lambda options: "-".join(map(str, options.values())) or "plain")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_numbers_and_gradients(device: str, options: dict, masked: bool) -> None:
    moe = MoE(10, 6, 4, 2, device=device, dtype=torch.float64, **options)
    randomise(moe)
    x = torch.randn(2, 6, 10, device=device, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], device=device).bool() if masked else None
    y, aux = moe(x, mask)
    flat = token_by_token(moe, x.view(12, 10), None if mask is None else mask.flatten())
    assert_close(y, flat.view_as(x))
    assert aux.router_logits.shape == (2, 6, 4)

    weight = torch.randn_like(x)
    names, parameters = zip(*moe.named_parameters(), strict=True)
    got = torch.autograd.grad((y * weight).sum(), (x, *parameters))
    want = torch.autograd.grad((flat.view_as(x) * weight).sum(), (x, *parameters))
    for name, a, b in zip(("x", *names), got, want, strict=True):
        assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_aux(device: str) -> None:
    moe = MoE(8, 4, 6, 2, device=device)
    x = torch.randn(3, 5, 8, device=device)
    _, aux = moe(x)
    assert isinstance(aux, MoEAux)
    logits = F.linear(x, moe.gate.weight)
    assert_close(aux.router_logits, logits)
    counts = logits.topk(2).indices.flatten().bincount(minlength=6)
    assert torch.equal(aux.expert_load.long(), counts)
    assert not aux.expert_load.requires_grad
    assert_close(aux.load_balancing_loss, 6 * (counts / 15 * logits.softmax(-1).view(15, 6).mean(0)).sum())
    assert_close(aux.z_loss, logits.logsumexp(-1).square().mean())
    for loss in aux[:2]:
        assert torch.autograd.grad(loss, moe.gate.weight, retain_graph=True)[0].abs().sum() > 0

    _, quiet = MoE(8, 4, 6, 2, aux_losses=False, device=device)(x)
    assert quiet.load_balancing_loss is None and quiet.z_loss is None and int(quiet.expert_load.sum()) == 30

    mask = torch.zeros(3, 5, dtype=torch.bool, device=device)
    mask[:, :2] = True
    _, part = moe(x, mask)
    _, alone = moe(x[:, :2])
    for a, b in zip(part[:3], alone[:3], strict=True):
        assert_close(a, b)
    per_sequence = MoE(8, 4, 6, 2, balance="sequence", device=device)
    per_sequence.load_state_dict(moe.state_dict())
    singles = [moe(x[b])[1].load_balancing_loss for b in range(3)]
    assert_close(per_sequence(x)[1].load_balancing_loss, torch.stack(singles).mean())


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (1,), (), (2, 3, 4)])
def test_leading_dimensions(device: str, shape: tuple[int, ...]) -> None:
    moe = MoE(8, 4, 6, 2, shared_intermediate_size=4, device=device)
    x = torch.randn(*shape, 8, device=device, requires_grad=True)
    y, aux = moe(x)
    assert y.shape == x.shape
    assert aux.router_logits.shape == (*shape, 6)
    assert int(aux.expert_load.sum()) == 2 * math.prod(shape)
    (y.sum() + aux.load_balancing_loss + aux.z_loss).backward()
    assert all(p.grad.isfinite().all() for p in moe.parameters())
    assert_close(y.reshape(-1, 8), moe(x.reshape(-1, 8))[0])


def test_masked_tokens_do_nothing(device: str) -> None:
    moe = MoE(8, 4, 6, 2, device=device)
    x = torch.randn(4, 8, device=device)
    x[1:3] = math.nan
    x.requires_grad_()
    mask = torch.tensor([1, 0, 0, 1], device=device).bool()
    y, aux = moe(x, mask)
    assert not y[1:3].any()
    assert int(aux.expert_load.sum()) == 4
    experts = list(moe.experts.parameters())
    grads = torch.autograd.grad(y.sum(), experts)
    assert all(g.isfinite().all() for g in grads)


def test_routing_to_all_experts(device: str) -> None:
    moe = MoE(8, 4, 3, 3, device=device, dtype=torch.float64)
    x = torch.randn(5, 8, device=device, dtype=torch.float64)
    assert_close(moe(x)[0], token_by_token(moe, x))


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"top_k": 5}, ["top_k=5", "num_experts=4"]),
        ({"activation": "tanh"}, ["swiglu", "relu2", "'tanh'"]),
        ({"glu_layout": "up"}, ["gate_up", "interleaved", "'up'"]),
        ({"scoring": "none"}, ["softmax", "'none'"]),
        ({"balance": "token"}, ["sequence", "'token'"]),
        ({"shared_gate": True}, ["shared_intermediate_size", "None"]),
        ({"num_groups": 3}, ["num_experts=4", "num_groups=3"]),
    ],
)
def test_bad_construction(kwargs: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        MoE(**{"hidden_size": 8, "intermediate_size": 4, "num_experts": 4, "top_k": 2, **kwargs})
    for word in words:
        assert word in str(error.value)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_experts >= 1, got 0"):
        Experts(0, 8, 4)
    moe = MoE(8, 4, 4, 2)
    with pytest.raises(ValueError, match=r"expected x of shape \[\.\.\., 8\], got \[3, 7\]"):
        moe(torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"token_mask.*\[2\] and \[3\]"):
        moe(torch.randn(3, 8), torch.ones(2, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="selection_bias=True"):
        moe.update_selection_bias(torch.ones(4))


def same_block(ours: MoE, theirs: torch.nn.Module, x: Tensor, names: dict[str, str] | None = None) -> None:
    """Compare outputs and all gradients; `names` maps our parameters to theirs where they differ."""
    x = x.requires_grad_()
    y = ours(x)[0]
    out = theirs(x)
    out = out[0] if isinstance(out, tuple) else out
    assert_close(y, out.view_as(y), rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(y)
    theirs_by_name = dict(theirs.named_parameters())
    pairs = [(name, p, theirs_by_name[(names or {}).get(name, name)]) for name, p in ours.named_parameters()]
    got = torch.autograd.grad((y * weight).sum(), [x] + [p for _, p, _ in pairs])
    want = torch.autograd.grad((out.view_as(y) * weight).sum(), [x] + [p for _, _, p in pairs])
    for name, a, b in zip(["x"] + [n for n, _, _ in pairs], got, want, strict=True):
        b = b.transpose(1, 2) if a.shape != b.shape else b
        assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def transformers_block(model: str, block: str, config: str, **sizes: object) -> torch.nn.Module:
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    built = getattr(pytest.importorskip(f"transformers.models.{model}.configuration_{model}"), config)(**sizes)
    built._experts_implementation = "eager"
    module = getattr(modeling, block)(built)
    randomise(module)
    return module


def test_mixtral_block_loads_and_agrees() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2}
    theirs = transformers_block("mixtral", "MixtralSparseMoeBlock", "MixtralConfig", **sizes)
    ours = MoE(16, 12, 4, 2)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    same_block(ours, theirs, torch.randn(2, 5, 16))


def test_qwen2_moe_block_loads_and_agrees() -> None:
    theirs = transformers_block(
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        "Qwen2MoeConfig",
        hidden_size=16,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=False,
    )
    ours = MoE(16, 12, 6, 3, normalize_gates=False, shared_intermediate_size=20, shared_gate=True)
    ours.load_state_dict(theirs.state_dict())
    same_block(ours, theirs, torch.randn(2, 5, 16))


def test_deepseek_v3_block_agrees() -> None:
    theirs = transformers_block(
        "deepseek_v3",
        "DeepseekV3MoE",
        "DeepseekV3Config",
        hidden_size=16,
        moe_intermediate_size=12,
        n_routed_experts=8,
        num_local_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    with torch.no_grad():
        theirs.gate.e_score_correction_bias.normal_(std=0.2)
    ours = MoE(
        16,
        12,
        8,
        3,
        scoring="sigmoid",
        selection_bias=True,
        num_groups=4,
        top_groups=2,
        scale=2.5,
        shared_intermediate_size=24,
    )
    state = {name.replace("shared_experts.", "shared_expert."): v for name, v in theirs.state_dict().items()}
    ours.load_state_dict(state)
    names = {name.replace("shared_experts.", "shared_expert."): name for name, _ in theirs.named_parameters()}
    same_block(ours, theirs, torch.randn(2, 5, 16), names)


def test_gpt_oss_block_agrees() -> None:
    theirs = transformers_block(
        "gpt_oss",
        "GptOssMLP",
        "GptOssConfig",
        hidden_size=16,
        intermediate_size=12,
        num_local_experts=6,
        num_experts_per_tok=3,
    )
    ours = MoE(16, 12, 6, 3, activation="swiglu_clamped", glu_layout="interleaved", bias=True, router_bias=True)
    state = {name.replace("router.", "gate."): v for name, v in theirs.state_dict().items()}
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        state[name] = state[name].transpose(1, 2)  # gpt-oss keeps [E, in, out]
    ours.load_state_dict(state)
    names = {name.replace("router.", "gate."): name for name, _ in theirs.named_parameters()}
    same_block(ours, theirs, torch.randn(2, 5, 16), names)


def test_meta_device_then_reset(device: str) -> None:
    options = {"bias": True, "selection_bias": True, "shared_intermediate_size": 4, "shared_gate": True}
    meta = MoE(8, 4, 4, 2, device="meta", **options)
    y, aux = meta(torch.empty(2, 3, 8, device="meta"))
    assert y.shape == (2, 3, 8) and aux.router_logits.shape == (2, 3, 4)
    moe = meta.to_empty(device=device)
    for tensor in moe.state_dict().values():
        tensor.fill_(math.nan)
    moe.reset_parameters()
    for name, tensor in moe.state_dict().items():
        assert tensor.isfinite().all(), name
        assert tensor.any() != name.endswith("bias"), name
    assert moe(torch.randn(3, 8, device=device))[0].isfinite().all()


def test_state_dict_names_and_copies() -> None:
    moe = MoE(
        8, 4, 4, 2, bias=True, router_bias=True, selection_bias=True, shared_intermediate_size=6, shared_gate=True
    )
    shapes = {name: list(value.shape) for name, value in moe.state_dict().items()}
    assert shapes == {
        "gate.weight": [4, 8],
        "gate.bias": [4],
        "gate.e_score_correction_bias": [4],
        "experts.gate_up_proj": [4, 8, 8],
        "experts.gate_up_proj_bias": [4, 8],
        "experts.down_proj": [4, 8, 4],
        "experts.down_proj_bias": [4, 8],
        "shared_expert.gate_proj.weight": [6, 8],
        "shared_expert.gate_proj.bias": [6],
        "shared_expert.up_proj.weight": [6, 8],
        "shared_expert.up_proj.bias": [6],
        "shared_expert.down_proj.weight": [8, 6],
        "shared_expert.down_proj.bias": [8],
        "shared_expert_gate.weight": [1, 8],
    }
    assert set(MoE(8, 4, 4, 2, activation="relu2").state_dict()) == {
        "gate.weight",
        "experts.up_proj",
        "experts.down_proj",
    }
    assert moe.router is moe.gate
    x = torch.randn(3, 8)
    want = moe(x)[0]
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(other(x)[0], want)
    assert "gate_up" in repr(moe) and "top_k=2" in repr(moe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_model(device: str, dtype: torch.dtype) -> None:
    moe = MoE(32, 16, 4, 2, bias=True, device=device, dtype=dtype)
    randomise(moe)
    x = torch.randn(9, 32, device=device, dtype=dtype, requires_grad=True)
    y, aux = moe(x)
    assert y.dtype == dtype
    assert aux.router_logits.dtype == aux.z_loss.dtype == aux.load_balancing_loss.dtype == torch.float32
    wide = copy.deepcopy(moe).double()
    want = wide(x.detach().double())[0].detach()
    assert_close(y.double(), want, rtol=5e-2, atol=3e-2 * want.std().item())
    y.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in moe.parameters())


def test_autocast(device: str) -> None:
    moe = MoE(32, 16, 4, 2, shared_intermediate_size=8, shared_gate=True, device=device)
    randomise(moe, 0.2)
    x = torch.randn(9, 32, device=device)
    with torch.no_grad():
        want, exact = moe(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, aux = moe(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(aux.router_logits, exact.router_logits)
    assert torch.equal(aux.expert_load, exact.expert_load)
    assert_close(y.float(), want, rtol=5e-2, atol=3e-2 * want.std().item())
    (y.float().sum() + aux.z_loss).backward()
    assert all(p.grad.dtype == torch.float32 for p in moe.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(device: str, reentrant: bool) -> None:
    moe = MoE(8, 4, 4, 2, jitter=0.1, shared_intermediate_size=4, device=device)
    x = torch.randn(6, 8, device=device, requires_grad=True)

    def layer(x: Tensor) -> tuple[Tensor, Tensor]:
        y, aux = moe(x)
        return y, aux.load_balancing_loss  # the reentrant kind sees no tensors inside other values

    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        moe.zero_grad()
        torch.manual_seed(1)
        y, loss = run(x)
        (y.square().sum() + loss).backward()
        results.append([p.grad for p in moe.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_functional_call_and_subset_of_gradients(device: str) -> None:
    moe = MoE(8, 4, 4, 2, device=device)
    x = torch.randn(6, 8, device=device)
    state = {name: (p.detach() * 2).requires_grad_() for name, p in moe.named_parameters()}
    other = copy.deepcopy(moe)
    other.load_state_dict(state)
    results = []
    for y, aux in (torch.func.functional_call(moe, state, (x,)), other(x)):
        results.append(y.square().sum() + aux.z_loss)
    got = torch.autograd.grad(results[0], list(state.values()))
    for a, b in zip(got, torch.autograd.grad(results[1], list(other.parameters())), strict=True):
        assert torch.equal(a, b)

    frozen = copy.deepcopy(moe).requires_grad_(False)
    frozen.gate.requires_grad_(True)
    y, _ = frozen(x)
    y.sum().backward()
    assert frozen.experts.down_proj.grad is None and frozen.gate.weight.grad is not None


@pytest.mark.parametrize(
    "options, masked",
    [
        ({}, False),
        ({"scoring": "sigmoid", "selection_bias": True, "num_groups": 2, "top_groups": 1, "balance": "sequence"}, True),
        ({"bias": True, "activation": "relu2", "shared_intermediate_size": 4, "shared_gate": True}, True),
    ],
    ids=["plain", "deepseek", "shared"],
)
def test_compile(device: str, fresh_compiler: None, options: dict, masked: bool) -> None:
    moe = MoE(8, 6, 4, 2, device=device, **options)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, backend=graphs)
    compilations = []
    for length in (3, 17, 40):
        x = torch.randn(2, length, 8, device=device, requires_grad=True)
        mask = torch.rand(2, length, device=device) < 0.7 if masked else None
        for tensor in (x,) if mask is None else (x, mask):
            torch._dynamo.mark_dynamic(tensor, 1)
        results = []
        for run in (moe, compiled):
            y, aux = run(x, mask)
            loss = y.square().sum() + aux.load_balancing_loss + aux.z_loss
            results.append((y, *aux, *torch.autograd.grad(loss, [x, *moe.parameters()])))
        for a, b in zip(*results, strict=True):
            assert_close(a, b)
        compilations.append(graphs.frame_count)
    assert compilations[0] == compilations[-1]  # other lengths need no other graph


def test_compile_narrow(device: str, fresh_compiler: None) -> None:
    """The router's own autograd function, traced."""
    moe = MoE(8, 6, 4, 2, device=device, dtype=torch.bfloat16)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 8, device=device, dtype=torch.bfloat16)
    for a, b in zip(
        *(torch.autograd.grad(run(x)[0].sum(), [*moe.parameters()]) for run in (moe, compiled)), strict=True
    ):
        assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_export(device: str) -> None:
    moe = MoE(8, 6, 4, 2, shared_intermediate_size=4, device=device).eval()
    x = torch.randn(2, 5, 8, device=device)
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(moe, (x,), dynamic_shapes=({1: tokens},))
    longer = torch.randn(2, 11, 8, device=device)
    assert_close(program.module()(longer)[0], moe(longer)[0])


def test_balancing_loss_balances() -> None:
    moe = MoE(8, 4, 8, 1, router_bias=True)
    with torch.no_grad():
        moe.gate.weight.normal_()
        moe.gate.bias.copy_(torch.linspace(-1, 1, 8))
    x = torch.randn(256, 8)
    optimiser = torch.optim.Adam(moe.gate.parameters(), lr=0.02)
    before = moe(x)[1].expert_load.float().std()
    for _ in range(80):
        optimiser.zero_grad()
        moe(x)[1].load_balancing_loss.backward()
        optimiser.step()
    assert moe(x)[1].expert_load.float().std() < before / 2


def test_no_synchronisation(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")
    moe = MoE(32, 16, 8, 2, scoring="sigmoid", selection_bias=True, shared_intermediate_size=8, device=device)
    x = torch.randn(2, 9, 32, device=device, requires_grad=True)
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, aux = moe(x, mask)
        (y.sum() + aux.load_balancing_loss + aux.z_loss).backward()
        moe.update_selection_bias(aux.expert_load)
    finally:
        torch.cuda.set_sync_debug_mode("default")
