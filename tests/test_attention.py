"""The mixture of attention: numbers against plain loops, masks, caches, and the training tools around it."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from scattermoe.attention import MixtureOfAttention
from scattermoe.cache import KVCache, StaticKVCache
from scattermoe.rotary import apply_rotary, rotary_embedding

HIDDEN, EXPERTS, TOP_K, HEADS, WIDTH = 12, 5, 2, 3, 4


def build(device: str, dtype: torch.dtype = torch.float64, **options: object) -> MixtureOfAttention:
    layer = MixtureOfAttention(HIDDEN, EXPERTS, TOP_K, HEADS, WIDTH, device=device, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
    return layer


def inputs(device: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, HIDDEN, device=device, dtype=dtype, requires_grad=True)


def rotate(v: Tensor, position: float, theta: float) -> Tensor:
    """One head's vector as complex numbers times unit numbers."""
    half = v.numel() // 2
    angles = torch.tensor([position / theta ** (i / half) for i in range(half)], dtype=v.dtype, device=v.device)
    turned = torch.complex(v[:half], v[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag))


def loops(layer: MixtureOfAttention, x: Tensor, attends: Tensor, real: Tensor, positions: Tensor) -> Tensor:
    """One sequence [S, H], query by query, expert by expert, head by head; attends [S, S] says who sees whom."""
    gates, ids, _ = layer.gate(x)
    experts, size = layer.experts, HEADS * WIDTH
    kv = layer.kv_proj(x)
    out = []
    for t in range(x.size(0)):
        y = torch.zeros_like(x[t]) if layer.bias is None else layer.bias
        for gate, e in zip(gates[t], ids[t].tolist(), strict=True):
            if not real[t]:
                continue
            q = experts.q_proj[e] @ x[t]
            if experts.q_proj_bias is not None:
                q = q + experts.q_proj_bias[e]
            heads = []
            for h in range(HEADS):
                part = slice(h * WIDTH, (h + 1) * WIDTH)
                seen = [s for s in range(x.size(0)) if attends[t, s]]
                keys, query = [kv[s, :size][part] for s in seen], q[part]
                if layer.rope_theta is not None:
                    query = rotate(query, positions[t].item(), layer.rope_theta)
                    keys = [rotate(k, positions[s].item(), layer.rope_theta) for k, s in zip(keys, seen, strict=True)]
                scores = torch.stack([query @ k for k in keys]) * layer.attention_scale
                values = torch.stack([kv[s, size:][part] for s in seen])
                heads.append(scores.softmax(0) @ values)
            row = experts.o_proj[e] @ torch.cat(heads)
            y = y + gate * (row if experts.o_proj_bias is None else row + experts.o_proj_bias[e])
        out.append(y)
    return torch.stack(out)


def causal_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


LAYERS = [
    {},
    {"causal": False},
    {"rope_theta": None},
    {"causal": False, "rope_theta": None, "bias": True},
    {"bias": True, "expert_bias": True, "kv_bias": True, "router_bias": True, "rope_theta": 100.0},
    {"normalize_gates": "detach", "attention_scale": 0.3},
    {"scoring": "sigmoid", "selection_bias": True, "scale": 2.0, "normalize_gates": False},
]


@pytest.mark.parametrize("options", LAYERS, ids=lambda options: "-".join(map(str, options.values())) or "plain")
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_numbers_and_gradients(device: str, options: dict, padding: str) -> None:
    layer = build(device, **options)
    x = inputs(device, 2, 5)
    real = torch.ones(2, 5, dtype=torch.bool)
    if padding == "left":
        real[1, :2] = False
    if padding == "right":
        real[1, 3:] = False
    y, aux = layer(x, None if padding == "none" else real.to(device))
    rows = causal_mask(5) if layer.causal else torch.ones(5, 5, dtype=torch.bool)
    want = torch.stack([loops(layer, x[b], rows & real[b], real[b], torch.arange(5)) for b in range(2)])
    assert_close(y, want)
    assert aux.router_logits.shape == (2, 5, EXPERTS)
    assert int(aux.expert_load.sum()) == TOP_K * int(real.sum())

    weight = torch.randn_like(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    got = torch.autograd.grad((y * weight).sum(), (x, *parameters))
    wanted = torch.autograd.grad((want * weight).sum(), (x, *parameters))
    for name, a, b in zip(("x", *names), got, wanted, strict=True):
        assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("causal", [False, True])
def test_masks_say_the_same_in_all_forms(device: str, causal: bool) -> None:
    layer = build(device, causal=causal)
    x = inputs(device, 2, 6)
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], device=device)
    seen = real.bool().view(2, 1, 1, 6).expand(2, 1, 6, 6)
    if causal:
        seen = seen & causal_mask(6).to(device)
    added = torch.zeros(2, 1, 6, 6, device=device, dtype=x.dtype).masked_fill(~seen, -math.inf)
    want = layer(x, real)[0]
    for mask in (real.bool(), seen, added, added.float()):
        y = layer(x, mask)[0]
        assert_close(y[real.bool()], want[real.bool()])
    assert_close(layer(x, torch.ones_like(real))[0], layer(x)[0])
    assert_close(layer(x[0], real[0])[0], want[0])
    if not causal:
        assert_close(layer(x, real.bool().view(2, 1, 1, 6))[0][real.bool()], want[real.bool()])


def test_a_mask_of_four_dimensions_says_everything(device: str) -> None:
    layer = build(device)
    x = inputs(device, 1, 5)
    window = causal_mask(5) & ~causal_mask(5).tril(-2)  # a token and the one before it
    want = loops(layer, x[0], window, torch.ones(5), torch.arange(5))
    assert_close(layer(x, window.view(1, 1, 5, 5).to(device))[0][0], want)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_leaks_nothing(device: str, causal: bool) -> None:
    layer = build(device, dtype=torch.float32, causal=causal)
    x = torch.randn(3, 5, HIDDEN, device=device)
    real = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], device=device).bool()
    other = torch.where(real.unsqueeze(-1), x, torch.randn_like(x) * 50)
    results = []
    for case in (x, other):
        case = case.clone().requires_grad_()
        y, aux = layer(case, real)
        loss = y.square().sum() + aux.load_balancing_loss + aux.z_loss
        grads = torch.autograd.grad(loss, [case, *layer.parameters()])
        assert not y[~real].any() and not grads[0][~real].any()
        results.append((y, *aux[:3], *grads))
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        assert_close(a, b)


def test_positions(device: str) -> None:
    layer = build(device)
    x = inputs(device, 2, 5)
    base = layer(x)[0]
    assert_close(layer(x, position_ids=torch.arange(5, device=device))[0], base)
    assert_close(layer(x, position_ids=torch.arange(5, device=device) + 1000)[0], base)  # only distances matter
    each = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 1, 5, 9]], device=device)
    y = layer(x, position_ids=each)[0]
    assert_close(y[0], base[0])
    assert_close(y[1], loops(layer, x[1], causal_mask(5), torch.ones(5), each[1]))
    assert_close(layer(x, position_embeddings=rotary_embedding(each, WIDTH, dtype=x.dtype))[0], y)
    silent = build(device, rope_theta=None)
    silent.load_state_dict(layer.state_dict())
    assert_close(silent(x, position_embeddings=rotary_embedding(each, WIDTH, dtype=x.dtype))[0], y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rotary(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 7, 250])
    cos, sin = rotary_embedding(positions, 6, 500.0, dtype)
    assert cos.dtype == sin.dtype == dtype
    x = torch.randn(4, 6, dtype=dtype)
    want = torch.stack([rotate(row, p, 500.0) for row, p in zip(x, positions.tolist(), strict=True)])
    tol = 1e-4 if dtype == torch.float32 else 1e-11
    assert_close(apply_rotary(x, cos, sin), want, rtol=tol, atol=tol)
    half, _ = rotary_embedding(positions, 6, 500.0, torch.bfloat16)
    assert_close(half.float(), cos.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("steps", [[6], [1] * 6, [3, 1, 2], [1, 4, 1]], ids=str)
def test_decoding_equals_the_whole(device: str, kind: str, causal: bool, steps: list[int]) -> None:
    layer = build(device, causal=causal)
    x = inputs(device, 2, 6).detach()
    cache = layer.make_cache() if kind == "growing" else layer.make_cache(2, 9)
    start = 0
    with torch.no_grad():
        for step in steps:
            assert int(cache.length) == start
            y, aux = layer(x[:, start : start + step], cache=cache)
            end = start + step
            whole = layer(x[:, :end])[0] if not causal else layer(x)[0][:, :end]
            assert_close(y, whole[:, start:])
            assert int(aux.expert_load.sum()) == 2 * step * TOP_K
            start = end
        assert int(cache.length) == 6
        cache.reset()
        assert_close(layer(x, cache=cache)[0], layer(x)[0])


@pytest.mark.parametrize("kind", ["growing", "static", "static with the whole mask"])
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_decoding_padded_batches(device: str, kind: str, side: str) -> None:
    layer = build(device)
    x = inputs(device, 3, 7).detach()
    real = torch.ones(3, 7, dtype=torch.bool, device=device)
    if side == "left":
        real[1, :3], real[2, :1] = False, False
    elif side == "right":  # of the prompt of 4 positions; three new tokens follow
        real[1, 2:4], real[2, 3:4] = False, False
    else:
        real[1, 1], real[2, 5] = False, False
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = layer(x, real, position_ids=positions)[0]
        # Each sequence alone, without its padding.
        for b in range(3):
            assert_close(whole[b][real[b]], layer(x[b][real[b]])[0])
        cache = layer.make_cache() if kind == "growing" else layer.make_cache(3, 8)
        wide = F.pad(real, (0, 1))
        for start, end in [(0, 4), (4, 5), (5, 7)]:
            mask = wide if kind == "static with the whole mask" else real[:, :end]
            y = layer(x[:, start:end], mask, position_ids=positions[:, start:end], cache=cache)[0]
            assert_close(y, whole[:, start:end])


def test_greedy_generation_with_padding_and_beams(device: str) -> None:
    """A tiny language model, decoded as generate() does it: prefill, then one token at a time."""
    layer = build(device, dtype=torch.float32)
    table = torch.randn(11, HIDDEN, device=device)

    def logits(tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None, cache=None) -> Tensor:
        return layer(table[tokens], mask, position_ids=positions, cache=cache)[0][:, -1] @ table.t()

    prompts = [torch.tensor([3, 1, 4, 1, 5], device=device), torch.tensor([9, 2], device=device)]
    with torch.no_grad():
        alone = []
        for prompt in prompts:
            tokens = prompt.unsqueeze(0)
            for _ in range(5):
                tokens = torch.cat((tokens, logits(tokens).argmax(-1, keepdim=True)), dim=1)
            alone.append(tokens[0, -5:])
        for cache in (layer.make_cache(), layer.make_cache(2, 10)):
            tokens = torch.stack([F.pad(prompt, (5 - prompt.numel(), 0)) for prompt in prompts])
            mask = torch.tensor([[1] * 5, [0] * 3 + [1] * 2], device=device)
            new, made = tokens, []
            for _ in range(5):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.size(1) :]
                new = logits(new, mask, positions, cache).argmax(-1, keepdim=True)
                made.append(new)
                mask = F.pad(mask, (0, 1), value=1)
            assert torch.equal(torch.cat(made, dim=1), torch.stack(alone))

        x = torch.randn(2, 4, HIDDEN, device=device)
        swap = torch.tensor([1, 0], device=device)
        for cache in (layer.make_cache(), layer.make_cache(2, 4)):
            layer(x[:, :3], cache=cache)
            cache.reorder(swap)
            y = layer(x[swap, 3:], cache=cache)[0]
            assert_close(y, layer(x)[0][swap, 3:], rtol=1e-4, atol=1e-5)
        KVCache().reorder(swap)


def test_gradients_flow_through_a_growing_cache(device: str) -> None:
    layer = build(device)
    x = inputs(device, 2, 5)
    cache = layer.make_cache()
    y = torch.cat([layer(x[:, :3], cache=cache)[0], layer(x[:, 3:], cache=cache)[0]], dim=1)
    want = layer(x)[0]
    weight = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]),
        torch.autograd.grad((want * weight).sum(), [x, *layer.parameters()]),
        strict=True,
    ):
        assert_close(a, b)


def test_bad_caches(device: str) -> None:
    layer = build(device, dtype=torch.float32)
    x = torch.randn(2, 3, HIDDEN, device=device)
    with pytest.raises(ValueError, match="batch_size=2 and max_length=None"):
        layer.make_cache(2)
    with pytest.raises(RuntimeError, match="no_grad"):
        layer(x, cache=layer.make_cache(2, 4))
    with torch.no_grad():
        cache = layer.make_cache(2, 4)
        layer(x, cache=cache)
        with pytest.raises(ValueError, match="at most 4 positions, got 3 and 3 more"):
            layer(x, cache=cache)
        with pytest.raises(ValueError, match="at most 4 positions"):
            layer(torch.randn(2, 5, HIDDEN, device=device), cache=layer.make_cache(2, 4))
        with pytest.raises(ValueError, match=r"keys of shape \[3, 3, positions, 4\]"):
            layer(x, cache=layer.make_cache(3, 4))
        with pytest.raises(ValueError, match=r"dtype torch\.bfloat16, got torch\.float32"):
            layer(x, cache=layer.make_cache(2, 4, dtype=torch.bfloat16))
        grown = layer.make_cache()
        layer(x, cache=grown)
        with pytest.raises(ValueError, match=r"keys of shape \[2, 3, positions, 4\]"):
            layer(x[:1], cache=grown)
        with pytest.raises(ValueError, match=r"attention_mask.size\(1\).*6, got 3"):
            layer(x, torch.ones(2, 3), cache=grown)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"top_k": 6}, ["top_k=6", "num_experts=5"]),
        ({"head_dim": 5}, ["even head_dim", "5"]),
        ({"head_dim": 0}, ["head_dim >= 1", "0"]),
        ({"num_kv_heads": 0}, ["num_kv_heads", "0"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"scoring": "none"}, ["softmax", "'none'"]),
        ({"balance": "none"}, ["sequence", "'none'"]),
    ],
)
def test_bad_construction(kwargs: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        MixtureOfAttention(
            **{"hidden_size": 8, "num_experts": 5, "top_k": 2, "num_kv_heads": 2, "head_dim": 4, **kwargs}
        )
    for word in words:
        assert word in str(error.value)
    assert MixtureOfAttention(8, 5, 2, 2, 5, rope_theta=None)(torch.randn(1, 2, 8))[0].shape == (1, 2, 8)


def test_bad_input(device: str) -> None:
    layer = build(device)
    x = inputs(device, 2, 3)
    for shape in [(3, HIDDEN + 1), (1, 2, 3, HIDDEN), (HIDDEN,)]:
        with pytest.raises(ValueError, match=r"expected x of shape \[batch, sequence, 12\]"):
            layer(torch.randn(shape, device=device, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"attention_mask.size\(0\) == x.size\(0\), got 3 and 2"):
        layer(x, torch.ones(3, 3, device=device))
    with pytest.raises(ValueError, match=r"attention_mask.size\(1\).*3, got 4"):
        layer(x, torch.ones(2, 4, device=device))
    for shape in [(2, 3, 3), (2, 2, 3, 3), (2, 1, 2, 3), (2, 1, 3, 2)]:
        with pytest.raises(ValueError, match=r"\[batch, 3\] or \[batch, 1, 3, 3\], got"):
            layer(x, torch.ones(shape, device=device))
    with pytest.raises(ValueError, match=r"rotary embeddings of shape \[4, 4\]"):
        layer(x, position_ids=torch.arange(4, device=device))
    with pytest.raises(ValueError, match=r"head_dim=4, got rotary embeddings of shape \[3, 6\]"):
        layer(x, position_embeddings=rotary_embedding(torch.arange(3, device=device), 6))
    with pytest.raises(RuntimeError, match="selection_bias=True"):
        layer.update_selection_bias(torch.ones(EXPERTS))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1), (4,), (0,)])
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(device: str, shape: tuple[int, ...], causal: bool) -> None:
    layer = build(device, causal=causal, bias=True)
    x = inputs(device, *shape)
    y, aux = layer(x)
    assert y.shape == x.shape and aux.router_logits.shape == (*shape, EXPERTS)
    (y.sum() + aux.load_balancing_loss + aux.z_loss).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    if len(shape) == 1:
        assert_close(y, layer(x.unsqueeze(0))[0][0])


def test_one_expert_is_grouped_query_attention(device: str) -> None:
    """E = K = 1 is plain multi-head attention."""
    layer = MixtureOfAttention(16, 1, 1, 4, 4, rope_theta=None, normalize_gates=True, device=device)
    x = torch.randn(2, 7, 16, device=device)
    q = (x @ layer.experts.q_proj[0].t()).view(2, 7, 4, 4).transpose(1, 2)
    k, v = (part.view(2, 7, 4, 4).transpose(1, 2) for part in layer.kv_proj(x).chunk(2, -1))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 7, 16)
    assert_close(layer(x)[0], out @ layer.experts.o_proj[0].t())


def test_dropout_is_for_training_alone(device: str) -> None:
    layer = build(device, dropout=0.5)
    x = inputs(device, 2, 6)
    assert not torch.allclose(layer(x)[0], layer(x)[0])
    layer.eval()
    assert_close(layer(x)[0], layer(x)[0])


def test_state_dict_and_meta_device(device: str) -> None:
    options = {"bias": True, "expert_bias": True, "kv_bias": True, "router_bias": True, "selection_bias": True}
    layer = MixtureOfAttention(8, 5, 2, 2, 4, device="meta", **options)
    assert {name: list(value.shape) for name, value in layer.state_dict().items()} == {
        "bias": [8],
        "gate.weight": [5, 8],
        "gate.bias": [5],
        "gate.e_score_correction_bias": [5],
        "experts.q_proj": [5, 8, 8],
        "experts.q_proj_bias": [5, 8],
        "experts.o_proj": [5, 8, 8],
        "experts.o_proj_bias": [5, 8],
        "kv_proj.weight": [16, 8],
        "kv_proj.bias": [16],
    }
    y, _ = layer(torch.empty(2, 3, 8, device="meta"))
    assert y.shape == (2, 3, 8) and y.device.type == "meta"
    layer = layer.to_empty(device=device)
    for tensor in layer.state_dict().values():
        tensor.fill_(math.nan)
    layer.reset_parameters()
    for name, tensor in layer.state_dict().items():
        assert tensor.isfinite().all() and tensor.any() != name.endswith("bias"), name
    x = torch.randn(2, 3, 8, device=device)
    assert torch.equal(copy.deepcopy(layer)(x)[0], layer(x)[0])
    assert layer.router is layer.gate and "num_kv_heads=2" in repr(layer)


def test_selection_bias_and_losses(device: str) -> None:
    layer = build(device, dtype=torch.float32, selection_bias=True, balance="sequence")
    _, aux = layer(torch.randn(2, 6, HIDDEN, device=device))
    layer.update_selection_bias(aux.expert_load, rate=0.5)
    mean = aux.expert_load.float().mean()
    assert torch.equal(layer.gate.e_score_correction_bias, (mean - aux.expert_load.float()).sign() * 0.5)
    quiet = build(device, dtype=torch.float32, aux_losses=False)(torch.randn(2, 6, HIDDEN, device=device))[1]
    assert quiet.load_balancing_loss is None and quiet.z_loss is None


@pytest.mark.parametrize("padded", [False, True])
def test_autocast_and_bfloat16(device: str, padded: bool) -> None:
    layer = build(device, dtype=torch.float32, bias=True)
    x = torch.randn(2, 9, HIDDEN, device=device)
    mask = torch.ones(2, 9, device=device, dtype=torch.long)
    mask[1, :3] = 0
    mask = mask if padded else None
    with torch.no_grad():
        want, exact = layer(x, mask)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, aux = layer(x, mask)
    assert y.dtype == torch.bfloat16
    assert torch.equal(aux.router_logits, exact.router_logits)
    assert_close(y.float(), want, rtol=5e-2, atol=4e-2 * want.std().item())
    (y.float().sum() + aux.z_loss).backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    with torch.autocast(device, dtype=torch.bfloat16), torch.no_grad():
        cache = layer.make_cache(2, 9, dtype=torch.bfloat16)
        steps = [layer(x[:, t : t + 1], None if mask is None else mask[:, : t + 1], cache=cache)[0] for t in range(9)]
    assert_close(torch.cat(steps, 1).float(), want, rtol=5e-2, atol=4e-2 * want.std().item())

    narrow = copy.deepcopy(layer).bfloat16()
    y, aux = narrow(x.bfloat16(), mask)
    assert y.dtype == torch.bfloat16 and aux.router_logits.dtype == torch.float32
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in narrow.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(device: str, reentrant: bool) -> None:
    layer = build(device, dropout=0.2, jitter=0.1)
    x = inputs(device, 2, 5)
    results = []
    for run in (lambda x: layer(x)[0], lambda x: checkpoint(lambda x: layer(x)[0], x, use_reentrant=reentrant)):
        layer.zero_grad()
        torch.manual_seed(2)
        run(x).square().sum().backward()
        results.append([p.grad for p in layer.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("causal, padded", [(True, True), (False, False)])
def test_compile(device: str, fresh_compiler: None, causal: bool, padded: bool) -> None:
    layer = build(device, dtype=torch.float32, causal=causal, bias=True)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    compilations = []
    for length in (5, 17, 40):
        x = inputs(device, 2, length, dtype=torch.float32)
        mask = None
        if padded:
            mask = torch.ones(2, length, device=device, dtype=torch.long)
            mask[1, : length // 2] = 0
        for tensor in (x,) if mask is None else (x, mask):
            torch._dynamo.mark_dynamic(tensor, 1)
        results = []
        for run in (layer, compiled):
            y, aux = run(x, mask)
            loss = y.square().sum() + aux.load_balancing_loss + aux.z_loss
            results.append((y, *aux, *torch.autograd.grad(loss, [x, *layer.parameters()])))
        for a, b in zip(*results, strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-4)
        compilations.append(graphs.frame_count)
    assert compilations[0] == compilations[-1]


def test_compiled_decoding_with_a_static_cache(device: str, fresh_compiler: None) -> None:
    layer = build(device, dtype=torch.float32)
    x = torch.randn(2, 8, HIDDEN, device=device)
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=graphs)
    def step(x: Tensor, cache: StaticKVCache) -> Tensor:
        return layer(x, cache=cache)[0]

    with torch.no_grad():
        want = layer(x)[0]
        cache = layer.make_cache(2, 8)
        layer(x[:, :3], cache=cache)
        compilations = []
        for t in range(3, 8):
            assert_close(step(x[:, t : t + 1], cache), want[:, t : t + 1], rtol=1e-4, atol=1e-5)
            compilations.append(graphs.frame_count)
        assert int(cache.length) == 8
    assert compilations[0] == compilations[-1]


def test_no_synchronisation(device: str) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")
    layer = MixtureOfAttention(64, 8, 2, 4, 16, bias=True, device=device, dtype=torch.bfloat16)
    x = torch.randn(2, 9, 64, device=device, dtype=torch.bfloat16)
    mask = torch.ones(2, 9, dtype=torch.long, device=device)
    cache = layer.make_cache(2, 20)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in (None, mask):
            y, aux = layer(x, given)
            (y.sum() + aux.load_balancing_loss + aux.z_loss).backward()
        with torch.no_grad():
            layer(x, cache=cache)
            layer(x[:, :1], cache=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
