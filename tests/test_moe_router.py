"""The router and its balancing, against code that says the same in another way."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from scattermoe.router import TopKRouter, _UpcastLinear, expert_scores, update_selection_bias


def choose(logits: Tensor, router: TopKRouter) -> tuple[Tensor, Tensor]:
    """Token by token: the scores, the groups that may serve, the best experts, their gates."""
    gates, ids = [], []
    bias = router.e_score_correction_bias
    for row in logits:
        scores = row.softmax(0) if router.scoring == "softmax" else row.sigmoid()
        ranks = scores.detach().clone()
        if bias is not None:
            ranks += bias
        if router.num_groups > 1:
            groups = ranks.view(router.num_groups, -1)
            value = groups.amax(1) if bias is None else groups.sort(1, descending=True)[0][:, :2].sum(1)
            served = value.argsort(descending=True)[: router.top_groups].tolist()
            for g in range(router.num_groups):
                if g not in served:
                    groups[g] = -math.inf
        chosen = ranks.argsort(descending=True)[: router.top_k]
        chosen = chosen[scores[chosen].argsort(descending=True)]
        gate = scores[chosen]
        if router.normalize_gates:
            total = gate.sum()
            gate = gate / (total.detach() if router.normalize_gates == "detach" else total)
        gates.append(gate * router.scale)
        ids.append(chosen)
    return torch.stack(gates), torch.stack(ids)


RULES = [
    {},
    {"normalize_gates": False},
    {"normalize_gates": "detach"},
    {"normalize_gates": "detach", "scale": 3.0, "scoring": "sigmoid"},
    {"scale": 2.5},
    {"bias": True},
    {"scoring": "sigmoid"},
    {"scoring": "sigmoid", "selection_bias": True, "num_groups": 4, "top_groups": 2, "scale": 2.5},
    {"num_groups": 4, "top_groups": 2, "normalize_gates": False},
    {"selection_bias": True},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())) or "plain")
def test_choice_and_gradients(device: str, rule: dict) -> None:
    router = TopKRouter(12, 16, 3, init_std=1.0, device=device, dtype=torch.float64, **rule)
    if router.bias is not None:
        torch.nn.init.normal_(router.bias)
    if router.e_score_correction_bias is not None:
        torch.nn.init.normal_(router.e_score_correction_bias, std=0.3)
    x = torch.randn(9, 12, device=device, dtype=torch.float64, requires_grad=True)
    gates, ids, logits = router(x)
    logits_ref = x @ router.weight.t() + (0 if router.bias is None else router.bias)
    gates_ref, ids_ref = choose(logits_ref, router)
    assert_close(logits, logits_ref)
    assert torch.equal(ids, ids_ref)
    assert_close(gates, gates_ref)

    weight = torch.randn_like(gates)
    inputs = [x, *router.parameters()]
    for got, want in zip(
        torch.autograd.grad((gates * weight).sum(), inputs),
        torch.autograd.grad((gates_ref * weight).sum(), inputs),
        strict=True,
    ):
        assert_close(got, want)


def test_one_expert_per_token_is_not_normalised() -> None:
    router = TopKRouter(8, 4, 1)
    gates = router(torch.randn(6, 8)).gates
    assert (gates < 1).all()
    gates.sum().backward()
    assert router.weight.grad.abs().sum() > 0
    assert_close(TopKRouter(8, 4, 2)(torch.randn(6, 8)).gates.sum(-1), torch.ones(6))


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"top_k": 5}, ["top_k=5", "num_experts=4"]),
        ({"top_k": 0}, ["top_k=0", "num_experts=4"]),
        ({"num_experts": 0}, ["num_experts", "0"]),
        ({"scoring": "relu"}, ["softmax", "sigmoid", "relu"]),
        ({"normalize_gates": "yes"}, ["normalize_gates", "yes"]),
        ({"num_groups": 3}, ["num_experts=4", "num_groups=3"]),
        ({"num_groups": 2, "top_groups": 3}, ["top_groups", "3", "2"]),
        ({"top_k": 3, "num_groups": 2, "top_groups": 1}, ["top_k=3", "1 groups of 2"]),
        ({"jitter": 1.5}, ["jitter", "1.5"]),
    ],
)
def test_bad_construction(kwargs: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        TopKRouter(**{"hidden_size": 8, "num_experts": 4, "top_k": 2, **kwargs})
    for word in words:
        assert word in str(error.value)


def test_bad_input() -> None:
    router = TopKRouter(8, 4, 2)
    for shape in [(3, 7), (2, 3, 8), (8,)]:
        with pytest.raises(ValueError, match=r"expected x of shape \[tokens, 8\]"):
            router(torch.randn(shape))
    with pytest.raises(RuntimeError, match="selection_bias=True"):
        router.update_selection_bias(torch.ones(4))
    with pytest.raises(ValueError, match=r"\[3\] and \[4\]"):
        update_selection_bias(torch.zeros(4), torch.ones(3))
    with pytest.raises(TypeError, match=r"bias of a floating dtype, got torch\.int64"):
        update_selection_bias(torch.zeros(4, dtype=torch.long), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_score_in_float32(device: str, dtype: torch.dtype) -> None:
    router = TopKRouter(32, 8, 2, bias=True, device=device, dtype=dtype)
    x = torch.randn(6, 32, device=device, dtype=dtype, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        logits = router.logits(x)
    assert logits.dtype == torch.float32
    # The wide copies of x and of the weight are not what waits for backward.
    assert not [t for t in saved if t.dtype == torch.float32 and t.numel() >= router.weight.numel()]
    wide = [t.detach().double().requires_grad_() for t in (x, router.weight, router.bias)]
    logits_ref = wide[0] @ wide[1].t() + wide[2]
    assert_close(logits.double(), logits_ref, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(logits)
    want = torch.autograd.grad(logits_ref, wide, grad.double())
    for got, ref in zip(torch.autograd.grad(logits, (x, router.weight, router.bias), grad), want, strict=True):
        assert got.dtype == dtype
        assert_close(got.double(), ref, rtol=1e-2, atol=1e-2)
    narrow = TopKRouter(32, 8, 2, upcast=False, device=device, dtype=dtype)
    assert narrow(x).logits.dtype == dtype


def test_upcast_is_differentiable_twice() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def scores(x: Tensor, weight: Tensor) -> Tensor:
        return _UpcastLinear.apply(x, weight, torch.float64)

    assert torch.autograd.gradcheck(scores, (x, weight))
    assert torch.autograd.gradgradcheck(scores, (x, weight))


def test_autocast_leaves_the_router_in_float32(device: str) -> None:
    router = TopKRouter(32, 8, 2, device=device)
    x = torch.randn(6, 32, device=device)
    want = router(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = router(x)
        assert router(x.bfloat16()).logits.dtype == torch.float32
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.gates, want.gates)


def test_jitter_is_for_training_alone() -> None:
    router = TopKRouter(16, 16, 2, jitter=0.1)
    with torch.no_grad():
        router.weight.copy_(torch.eye(16))
    x = torch.rand(50, 16) + 0.5
    ratio = router.logits(x) / x
    assert ratio.min() >= 0.9 - 1e-5 and ratio.max() <= 1.1 + 1e-5 and ratio.std() > 0.02
    router.eval()
    assert torch.equal(router.logits(x), x)


def test_selection_bias_stays_float32(device: str) -> None:
    router = TopKRouter(8, 4, 2, selection_bias=True, device=device)
    router.e_score_correction_bias.copy_(torch.tensor([0.5001, -0.25, 0.0, 1.0003]))
    before = router.e_score_correction_bias.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.e_score_correction_bias, before)
    router.double()
    assert torch.equal(router.e_score_correction_bias, before)
    assert TopKRouter(8, 4, 2, selection_bias=True, device="meta").to(torch.bfloat16).e_score_correction_bias.is_meta
    assert set(router.state_dict()) == {"weight", "e_score_correction_bias"}


def test_selection_bias_balances_a_skewed_router() -> None:
    router = TopKRouter(8, 8, 2, selection_bias=True, scoring="sigmoid", bias=True)
    with torch.no_grad():
        router.weight.normal_()
        router.bias.copy_(torch.linspace(-2, 2, 8))  # the last experts take it all
    x = torch.randn(512, 8)

    def load() -> Tensor:
        return router(x).expert_ids.flatten().bincount(minlength=8)

    before = load().float().std()
    for _ in range(300):
        router.update_selection_bias(load(), rate=0.01)
    assert load().float().std() < before / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_bias_update(device: str, fresh_compiler: None, dtype: torch.dtype) -> None:
    """b_e += rate * sign(mean load - load_e), in a whole graph too; an even load, or none at all, changes nothing."""
    update = torch.compile(update_selection_bias, fullgraph=True, backend="aot_eager")
    for load in ([5, 1, 3, 3], [0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 9]):
        bias = torch.tensor([0.5, -0.5, 0.0, 1.0], device=device, dtype=dtype)
        mean = sum(load) / 4
        want = [b + 0.125 * ((mean > n) - (mean < n)) for b, n in zip(bias.tolist(), load, strict=True)]
        for step in (update_selection_bias, update):
            for load_dtype in (torch.int32, torch.int64, torch.float32):
                changed = bias.clone()
                assert step(changed, torch.tensor(load, device=device, dtype=load_dtype), 0.125) is changed
                assert changed.tolist() == want


def test_expert_scores(device: str) -> None:
    logits = torch.randn(3, 4, 5, device=device, dtype=torch.float64)
    assert_close(expert_scores(logits), logits.exp() / logits.exp().sum(-1, keepdim=True))
    assert_close(expert_scores(logits, "sigmoid"), 1 / (1 + (-logits).exp()))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert expert_scores(logits.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="scoring to be one of softmax, sigmoid, got 'relu'"):
        expert_scores(logits, "relu")
