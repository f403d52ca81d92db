"""MixtureOfAttention against transformers' implementation of JetMoE's attention, with the same weights."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from scattermoe.attention import JETMOE_KEYS, MixtureOfAttention
from scattermoe.rotary import rotary_embedding

jetmoe = pytest.importorskip("transformers.models.jetmoe.modeling_jetmoe")
from transformers import JetMoeConfig  # noqa: E402  (after the check that transformers is there)
from transformers.cache_utils import DynamicCache  # noqa: E402
from transformers.masking_utils import create_causal_mask  # noqa: E402

HIDDEN, EXPERTS, TOP_K, HEADS, WIDTH, THETA = 24, 6, 2, 3, 8, 5000.0


def config(implementation: str, top_k: int = TOP_K) -> JetMoeConfig:
    built = JetMoeConfig(
        hidden_size=HIDDEN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=top_k,
        num_key_value_heads=HEADS,
        kv_channels=WIDTH,
        num_hidden_layers=1,
        vocab_size=8,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    built._attn_implementation = implementation
    return built


def both(
    device: str, dtype: torch.dtype, implementation: str = "eager", top_k: int = TOP_K
) -> tuple[MixtureOfAttention, torch.nn.Module]:
    theirs = jetmoe.JetMoeAttention(config(implementation, top_k), layer_idx=0).to(device, dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = MixtureOfAttention(
        HIDDEN,
        EXPERTS,
        top_k,
        HEADS,
        WIDTH,
        bias=True,
        rope_theta=THETA,
        normalize_gates=True,
        device=device,
        dtype=dtype,
    )
    state = theirs.state_dict()
    ours.load_state_dict({name: state[JETMOE_KEYS[name]] for name in ours.state_dict()})
    assert set(state) == set(JETMOE_KEYS.values())
    return ours, theirs


def embeddings(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rotary = jetmoe.JetMoeRotaryEmbedding(config("eager")).to(positions.device)
    return rotary(torch.empty(0, dtype=dtype, device=positions.device), positions)


def their_mask(x: Tensor, padding: Tensor | None, positions: Tensor, past: DynamicCache | None = None) -> Tensor | None:
    return create_causal_mask(
        config=config("eager"), inputs_embeds=x, attention_mask=padding, past_key_values=past, position_ids=positions
    )


def compare_gradients(
    ours: MixtureOfAttention, theirs: torch.nn.Module, y: Tensor, out: Tensor, x: Tensor, tol: dict
) -> None:
    weight = torch.randn_like(y)
    names = list(dict(ours.named_parameters()))
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    got = torch.autograd.grad((y * weight).sum(), [x] + [mine[n] for n in names])
    want = torch.autograd.grad((out * weight).sum(), [x] + [other[JETMOE_KEYS[n]] for n in names])
    for name, a, b in zip(["x", *names], got, want, strict=True):
        assert_close(a, b, **tol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_outputs_and_gradients(device: str, top_k: int, implementation: str) -> None:
    ours, theirs = both(device, torch.float32, implementation, top_k)
    x = torch.randn(2, 9, HIDDEN, device=device, requires_grad=True)
    positions = torch.arange(9, device=device).unsqueeze(0)
    rotary = embeddings(positions, torch.float32)
    out, _, logits = theirs(x, their_mask(x, None, positions), position_embeddings=rotary)
    y, aux = ours(x)
    assert_close(y, out, rtol=1e-4, atol=2e-5)
    assert_close(aux.router_logits.flatten(0, 1), logits, rtol=1e-4, atol=1e-5)
    compare_gradients(ours, theirs, y, out, x, {"rtol": 1e-4, "atol": 2e-5})


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_outputs_and_gradients_in_float64(device: str, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = both(device, torch.float64, "sdpa", top_k)
    x = torch.randn(2, 9, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    rotary = embeddings(torch.arange(9, device=device).unsqueeze(0), torch.float64)
    # Their router rounds its logits to float32 by .float(), whatever the model's dtype.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    out = theirs(x, None, position_embeddings=rotary)[0]
    y, _ = ours(x, position_embeddings=rotary)
    assert_close(y, out, rtol=1e-10, atol=1e-12)
    compare_gradients(ours, theirs, y, out, x, {"rtol": 1e-9, "atol": 1e-11})


def test_bfloat16(device: str) -> None:
    ours, theirs = both(device, torch.float32, "sdpa")
    x = torch.randn(2, 9, HIDDEN, device=device).bfloat16()
    exact, _ = ours(x.float())
    ours, theirs = ours.bfloat16(), theirs.bfloat16()
    positions = torch.arange(9, device=device).unsqueeze(0)
    out = theirs(x, None, position_embeddings=embeddings(positions, torch.bfloat16))[0]
    got = (ours(x)[0].float() - exact).norm() / exact.norm()
    want = (out.float() - exact).norm() / exact.norm()
    assert got < max(1.5 * want, 2e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(device: str, side: str) -> None:
    ours, theirs = both(device, torch.float32)
    x = torch.randn(3, 8, HIDDEN, device=device, requires_grad=True)
    lengths = torch.tensor([[8], [5], [2]], device=device)
    steps = torch.arange(8, device=device)
    padding = steps >= 8 - lengths if side == "left" else steps < lengths
    positions = (padding.long().cumsum(1) - 1).clamp(min=0)
    rotary = embeddings(positions, torch.float32)
    mask = their_mask(x, padding.long(), positions)
    out = theirs(x, mask, position_embeddings=rotary)[0]
    for y in (ours(x, padding)[0], ours(x, padding.long(), position_ids=positions)[0], ours(x, mask)[0]):
        assert_close(y[padding], out[padding], rtol=1e-4, atol=2e-5)
    real = padding.unsqueeze(-1)
    y = ours(x, padding, position_ids=positions)[0]
    compare_gradients(ours, theirs, y * real, out * real, x, {"rtol": 1e-4, "atol": 2e-5})


def test_decoding_with_a_cache(device: str) -> None:
    ours, theirs = both(device, torch.float32)
    x = torch.randn(2, 7, HIDDEN, device=device)
    past, cache = DynamicCache(), ours.make_cache()
    with torch.no_grad():
        for start, end in [(0, 4), (4, 5), (5, 7)]:
            positions = torch.arange(start, end, device=device).unsqueeze(0)
            piece = x[:, start:end]
            mask = their_mask(piece, None, positions, past)
            out = theirs(piece, mask, position_embeddings=embeddings(positions, x.dtype), past_key_values=past)[0]
            y, _ = ours(piece, cache=cache)
            assert_close(y, out, rtol=1e-4, atol=2e-5)
    assert_close(cache.keys, past.layers[0].keys, rtol=1e-4, atol=2e-5)
    assert_close(cache.values, past.layers[0].values, rtol=1e-4, atol=2e-5)


def test_rotary_embedding() -> None:
    positions = torch.tensor([[0, 1, 5, 4000], [7, 2, 3, 100000]])
    for ours, theirs in zip(
        rotary_embedding(positions, WIDTH, THETA), embeddings(positions, torch.float32), strict=True
    ):
        assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
