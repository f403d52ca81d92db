"""The losses of a router, against loops over tokens and against what transformers computes."""

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from scattermoe.losses import load_balancing_loss, router_z_loss


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("balance", ["batch", "sequence"])
def test_load_balancing_loss(device: str, scoring: str, masked: bool, balance: str) -> None:
    batch, length, experts, top_k = 3, 7, 5, 2
    logits = torch.randn(batch, length, experts, device=device, dtype=torch.float64, requires_grad=True)
    ids = logits.topk(top_k).indices
    mask = torch.rand(batch, length, device=device) < 0.6 if masked else None
    if masked:
        mask[1] = False
    got = load_balancing_loss(logits, ids, scoring=scoring, balance=balance, token_mask=mask)

    def one(tokens: list[tuple[int, int]]) -> Tensor:
        total = torch.zeros((), device=device, dtype=torch.float64)
        for e in range(experts):
            taken = sum(int(e in ids[t].tolist()) for t in tokens)
            probability = torch.zeros((), device=device, dtype=torch.float64)
            for t in tokens:
                score = logits[t].exp() if scoring == "softmax" else logits[t].sigmoid()
                probability = probability + score[e] / score.sum()
            if tokens:
                total = total + experts * taken / len(tokens) * probability / len(tokens)
        return total

    real = [[(b, s) for s in range(length) if mask is None or bool(mask[b, s])] for b in range(batch)]
    if balance == "batch":
        want = one([t for sequence in real for t in sequence])
    else:
        want = torch.stack([one(sequence) for sequence in real]).mean()
    assert_close(got, want)
    assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0])


def test_load_balancing_loss_at_balance_and_collapse() -> None:
    ids = torch.tensor([[0, 1], [2, 3]])
    assert_close(load_balancing_loss(torch.zeros(2, 4), ids), torch.tensor(2.0))
    collapsed = torch.tensor([[100.0, 0.0, 0.0, 0.0]]).expand(6, 4)
    assert_close(load_balancing_loss(collapsed, torch.zeros(6, 1, dtype=torch.long)), torch.tensor(4.0))
    given = load_balancing_loss(torch.zeros(2, 4), ids, expert_load=torch.tensor([1, 1, 1, 1]))
    assert_close(given, torch.tensor(2.0))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_mixtral_loss_is_transformers(device: str, layers: int, masked: bool) -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = [torch.randn(2, 9, 6, device=device, requires_grad=True) for _ in range(layers)]
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4], device=device) if masked else None
    want = modeling.load_balancing_loss_func(tuple(layer.view(-1, 6) for layer in logits), 6, 2, mask)
    ids = [layer.topk(2).indices for layer in logits]
    got = load_balancing_loss(logits, ids, token_mask=None if mask is None else mask.bool())
    assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, logits), torch.autograd.grad(want, logits), strict=True):
        assert_close(a, b)
    if not masked:
        assert_close(load_balancing_loss(torch.stack(logits), torch.stack(ids)), want)


def test_switch_losses_are_transformers(device: str) -> None:
    modeling = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    logits = torch.randn(3, 11, 4, device=device, requires_grad=True)
    ids = logits.argmax(-1, keepdim=True)
    pairs = [
        (
            load_balancing_loss(logits, ids, balance="sequence"),
            modeling.load_balancing_loss_func(logits.softmax(-1), ids),
        ),
        (router_z_loss(logits), modeling.router_z_loss_func(logits)),
    ]
    for got, want in pairs:
        assert_close(got, want)
        assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0])


@pytest.mark.parametrize("balance", ["batch", "sequence"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_deepseek_losses(device: str, balance: str, scoring: str, groups: int) -> None:
    """As the papers write them, over devices i that hold experts j: f_j = E / (K T) counts, f'_i the mean, P'_i the sum."""
    batch, length, experts, top_k = 2, 5, 6, 2
    logits = torch.randn(batch, length, experts, device=device, dtype=torch.float64, requires_grad=True)
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    scores = scores / scores.sum(-1, keepdim=True)
    ids = (logits + torch.randn_like(logits)).topk(top_k).indices
    parts = [list(range(length))] * batch
    sequences = [[(b, t) for t in parts[b]] for b in range(batch)]
    if balance == "batch":
        sequences = [[place for sequence in sequences for place in sequence]]
    losses = []
    for places in sequences:
        f = [experts / (top_k * len(places)) * sum(j in ids[p].tolist() for p in places) for j in range(experts)]
        P = [sum(scores[p][j] for p in places) / len(places) for j in range(experts)]
        size = experts // groups
        held = [range(i * size, (i + 1) * size) for i in range(groups)]
        losses.append(sum(sum(f[j] for j in e) / size * sum(P[j] for j in e) for e in held))
    want = torch.stack(losses).mean()
    got = load_balancing_loss(logits, ids, scoring=scoring, balance=balance, num_groups=groups) / top_k
    assert_close(got, want)
    if groups == experts:
        assert_close(load_balancing_loss(logits, ids, scoring=scoring, balance=balance) / top_k, want)
    if groups > 1:
        assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0])


@pytest.mark.parametrize("balance", ["batch", "sequence"])
def test_losses_compile(device: str, fresh_compiler: None, balance: str) -> None:
    def losses(logits: Tensor, more: Tensor, mask: Tensor) -> Tensor:
        layers = [logits, more]
        ids = [layer.topk(2).indices for layer in layers]
        balanced = load_balancing_loss(layers, ids, balance=balance, num_groups=2, token_mask=mask)
        return balanced + router_z_loss(logits, mask)

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(losses, fullgraph=True, backend=graphs)
    for length in (3, 17, 40):
        logits, more = (torch.randn(2, length, 4, device=device, requires_grad=True) for _ in range(2))
        mask = torch.rand(2, length, device=device) < 0.7
        for tensor in (logits, more, mask):
            torch._dynamo.mark_dynamic(tensor, 1)
        results = [(run(logits, more, mask),) for run in (losses, compiled)]
        results = [(loss, *torch.autograd.grad(loss, [logits, more])) for (loss,) in results]
        for a, b in zip(*results, strict=True):
            assert_close(a, b)
    assert graphs.frame_count == 1


def test_losses_are_wide_under_autocast(device: str) -> None:
    logits = torch.randn(2, 9, 6, device=device)
    ids = logits.topk(2).indices
    with torch.autocast(device, dtype=torch.bfloat16):
        narrow = load_balancing_loss(logits, ids), router_z_loss(logits)
        assert load_balancing_loss(logits.bfloat16(), ids).dtype == torch.float32
    assert torch.equal(narrow[0], load_balancing_loss(logits, ids)) and torch.equal(narrow[1], router_z_loss(logits))
    assert load_balancing_loss(logits.double(), ids).dtype == torch.float64


def test_nan_passes() -> None:
    logits = torch.randn(4, 6)
    ids = logits.topk(2).indices
    logits[1, 2] = math.nan
    assert load_balancing_loss(logits, ids).isnan() and router_z_loss(logits).isnan()
    real = torch.tensor([True, False, True, True])
    assert load_balancing_loss(logits, ids, token_mask=real).isfinite() and router_z_loss(logits, real).isfinite()


def test_z_loss(device: str) -> None:
    logits = torch.randn(3, 4, 5, device=device)
    mask = torch.rand(3, 4, device=device) < 0.5
    by_hand = torch.stack([row.exp().sum().log() ** 2 for row in logits.view(-1, 5)])
    assert_close(router_z_loss(logits), by_hand.mean())
    assert_close(router_z_loss(logits, mask), by_hand[mask.flatten()].mean())
    assert router_z_loss(logits.bfloat16()).dtype == torch.float32


def test_losses_without_tokens_are_zero() -> None:
    empty = torch.randn(0, 4, requires_grad=True)
    ids = torch.zeros(0, 2, dtype=torch.long)
    nobody = torch.zeros(3, dtype=torch.bool)
    nan = torch.full((3, 4), math.nan, requires_grad=True)
    for loss in (
        load_balancing_loss(empty, ids),
        load_balancing_loss(empty.view(0, 3, 4), ids.view(0, 3, 2), balance="sequence"),
        load_balancing_loss(torch.randn(2, 0, 4), torch.zeros(2, 0, 2, dtype=torch.long), balance="sequence"),
        load_balancing_loss(nan, torch.zeros(3, 2, dtype=torch.long), token_mask=nobody),
        router_z_loss(empty),
        router_z_loss(nan, nobody),
    ):
        assert loss.item() == 0


def test_bad_losses() -> None:
    logits, ids = torch.randn(4, 3), torch.zeros(4, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="batch, sequence, got 'token'"):
        load_balancing_loss(logits, ids, balance="token")
    with pytest.raises(ValueError, match=r"\[batch, sequence, experts\]"):
        load_balancing_loss(logits, ids, balance="sequence")
    with pytest.raises(ValueError, match="softmax, sigmoid, got 'relu'"):
        load_balancing_loss(logits, ids, scoring="relu")
    with pytest.raises(ValueError, match=r"\[4, 3\] and \[3, 2\]"):
        load_balancing_loss(logits, ids[:3])
    with pytest.raises(ValueError, match=r"token_mask.*\[3\] and \[4\]"):
        router_z_loss(logits, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="num_groups=2 and 3 experts"):
        load_balancing_loss(logits, ids, num_groups=2)
    with pytest.raises(ValueError, match="num_groups=0 and 3 experts"):
        load_balancing_loss(logits, ids, num_groups=0)
    with pytest.raises(ValueError, match="same layers, at least one, got 2 and 1"):
        load_balancing_loss([logits, logits], [ids])
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        load_balancing_loss([], [])
    with pytest.raises(ValueError, match=r"one shape in all layers, got \[4, 2\] and \[4, 3\]"):
        load_balancing_loss([logits, logits[:, :2]], [ids, ids])
    with pytest.raises(TypeError, match=r"expert_ids of an integer dtype, got torch\.float32"):
        load_balancing_loss(logits, ids.float())
