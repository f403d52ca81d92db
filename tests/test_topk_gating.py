"""topk_gating and its gradient against the reference."""

import pytest
import torch

import scattermoe
from tests.cases import DTYPES, EXPERT_COUNTS, LAYOUTS, Gating
from tests.checks import check

SCORINGS = ("softmax", "sigmoid")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("selection_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (4, 4), (3, 1)], ids=str)
def test_options(
    device: str, dtype: torch.dtype, scoring: str, normalize: bool, selection_bias: bool, groups: tuple[int, int]
) -> None:
    check(
        Gating(
            scoring=scoring,
            normalize=normalize,
            selection_bias=selection_bias,
            num_groups=groups[0],
            top_groups=groups[1],
            dtype=dtype,
            device=device,
        )
    )


@pytest.mark.parametrize("experts", EXPERT_COUNTS)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expert_counts(device: str, experts: int, scoring: str, dtype: torch.dtype) -> None:
    for k in {1, min(2, experts), min(8, experts), experts}:
        check(Gating(tokens=5, experts=experts, k=k, scoring=scoring, dtype=dtype, device=device))
        check(Gating(tokens=5, experts=experts, k=k, scoring=scoring, normalize=True, dtype=dtype, device=device))


@pytest.mark.parametrize("tokens", [0, 1, 257])
def test_tokens(device: str, tokens: int) -> None:
    check(Gating(tokens=tokens, dtype=torch.float32, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_memory_layouts(device: str, layout: str, grad_layout: str) -> None:
    check(Gating(layout=layout, grad_layout=grad_layout, dtype=torch.float32, device=device))


@pytest.mark.parametrize("scale", [2.5, 0.125, 0.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_scale(device: str, scale: float, normalize: bool) -> None:
    logits = torch.randn(7, 9, device=device, dtype=torch.float64, requires_grad=True)
    gates, ids = scattermoe.topk_gating(logits, 3, normalize=normalize, scale=scale)
    plain, plain_ids = scattermoe.topk_gating(logits, 3, normalize=normalize)
    assert torch.equal(ids, plain_ids)
    torch.testing.assert_close(gates, plain * scale)
    weights = torch.randn_like(gates)
    torch.testing.assert_close(
        torch.autograd.grad((gates * weights).sum(), logits)[0],
        torch.autograd.grad((plain * scale * weights).sum(), logits)[0],
    )


def test_normalized_gates_sum_to_the_scale(device: str) -> None:
    for scoring in SCORINGS:
        gates, _ = scattermoe.topk_gating(
            torch.randn(20, 64, device=device), 6, scoring=scoring, normalize=True, scale=2.5
        )
        torch.testing.assert_close(gates.sum(1), torch.full((20,), 2.5, device=device))


def test_large_logits_do_not_overflow(device: str) -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4 + 1, -1e4 - 1]], device=device, requires_grad=True)
    for scoring in SCORINGS:
        gates, ids = scattermoe.topk_gating(logits, 2, scoring=scoring)
        assert bool(gates.isfinite().all())
        (grad,) = torch.autograd.grad(gates.sum(), logits)
        assert bool(grad.isfinite().all())
    gates, ids = scattermoe.topk_gating(logits, 1)
    assert ids.flatten().tolist() == [0, 1]
    assert gates[0].item() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("bad", ["one", "all", "inf", "minus_inf"])
def test_ids_are_valid_whatever_the_logits(
    device: str, dtype: torch.dtype, scoring: str, groups: tuple[int, int], bad: str
) -> None:
    logits = torch.randn(6, 16, device=device, dtype=dtype)
    nan, inf = float("nan"), float("inf")
    if bad == "one":
        logits[1, 3] = nan
        logits[4, [0, 15]] = nan
    elif bad == "all":
        logits[1:4] = nan
    elif bad == "inf":
        logits[1, 3] = inf
        logits[2] = inf
    else:
        logits[1, 3] = -inf
        logits[2] = -inf
    gates, ids = scattermoe.topk_gating(logits, 5, scoring=scoring, num_groups=groups[0], top_groups=groups[1])
    assert bool(((ids >= 0) & (ids < 16)).all())
    for row in ids.tolist():
        assert len(set(row)) == 5
    rest = [0, 5]
    assert bool(gates[rest].isfinite().all())
    # NaN is not hidden where it decides every score.
    if bad in ("one", "all") and scoring == "softmax":
        assert bool(gates[1].isnan().any())


def test_equal_logits(device: str) -> None:
    gates, ids = scattermoe.topk_gating(torch.zeros(4, 10, device=device), 10)
    assert all(sorted(row) == list(range(10)) for row in ids.tolist())
    torch.testing.assert_close(gates, torch.full_like(gates, 0.1))


def test_selection_bias_chooses_but_does_not_weigh(device: str) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=device)
    bias = torch.tensor([-10.0, 0.0, 0.0, 5.0], device=device)
    gates, ids = scattermoe.topk_gating(logits, 2, scoring="sigmoid", selection_bias=bias)
    assert ids.tolist() == [[1, 3]]
    torch.testing.assert_close(gates, torch.sigmoid(logits)[:, [1, 3]])


def test_groups_by_hand(device: str) -> None:
    # Scores of three groups of two: the best single expert is in group 0, the best pair in group 1.
    scores = torch.tensor([[0.9, 0.1, 0.7, 0.6, 0.2, 0.3]], dtype=torch.float64, device=device)
    logits = torch.log(scores / (1 - scores))
    _, ids = scattermoe.topk_gating(logits, 2, scoring="sigmoid", num_groups=3, top_groups=1)
    assert sorted(ids[0].tolist()) == [0, 1]
    zero = torch.zeros(6, dtype=torch.float64, device=device)
    _, ids = scattermoe.topk_gating(logits, 2, scoring="sigmoid", selection_bias=zero, num_groups=3, top_groups=1)
    assert sorted(ids[0].tolist()) == [2, 3]


def test_result_routes(device: str) -> None:
    gates, ids = scattermoe.topk_gating(torch.randn(9, 7, device=device), 3)
    routing = scattermoe.route(ids, 7)
    assert routing.top_k == 3
    y = scattermoe.combine(torch.ones(27, 2, device=device), gates, routing)
    torch.testing.assert_close(y, gates.sum(1, keepdim=True).expand(9, 2))
