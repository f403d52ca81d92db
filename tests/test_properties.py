"""Properties over any shape and routing, searched by hypothesis."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scattermoe
from tests import reference
from tests.cases import DTYPES, EXPERT_COUNTS, LAYOUTS, ROUTINGS, WEIGHT_LAYOUTS, Combine, Gating, Linear, Mlp
from tests.checks import check
from tests.conftest import DEVICES

EXAMPLES = 40
sizes = st.integers(1, 40)
tokens = st.integers(0, 24)
experts = st.one_of(st.sampled_from(EXPERT_COUNTS), st.integers(1, 10))
devices = st.sampled_from(DEVICES)


def subsets(*names: str) -> st.SearchStrategy[tuple[str, ...]]:
    return st.sets(st.sampled_from(names)).map(lambda s: tuple(n for n in names if n in s))


@st.composite
def choices(draw: st.DrawFn) -> tuple[int, int]:
    """(experts, top_k) with K from 1 to E, now and then beyond."""
    e = draw(experts)
    return e, draw(st.integers(1, min(e + 2, 12)))


@st.composite
def ids_of(draw: st.DrawFn, max_experts: int = 6) -> tuple[torch.Tensor, int]:
    """Arbitrary expert ids, sentinels among them."""
    e = draw(st.integers(1, max_experts))
    n, k = draw(st.integers(0, 12)), draw(st.integers(1, 4))
    flat = draw(st.lists(st.integers(-2, e + 1), min_size=n * k, max_size=n * k))
    return torch.tensor(flat, dtype=torch.int64).reshape(n, k), e


@settings(max_examples=EXAMPLES)
@given(
    case=st.builds(
        Linear,
        tokens=tokens,
        n_in=sizes,
        n_out=sizes,
        routing=st.sampled_from(ROUTINGS),
        rows=st.sampled_from(("token", "slot", "grouped")),
        grouped_out=st.booleans(),
        bias=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        x_layout=st.sampled_from(LAYOUTS),
        weight_layout=st.sampled_from(WEIGHT_LAYOUTS),
        grad_layout=st.sampled_from(LAYOUTS),
        grads=subsets("x", "weight", "bias"),
        device=devices,
    ),
    choice=choices(),
)
def test_parallel_linear(case: Linear, choice: tuple[int, int]) -> None:
    check(dataclasses.replace(case, experts=choice[0], top_k=choice[1]))


@settings(max_examples=EXAMPLES)
@given(
    case=st.builds(
        Combine,
        tokens=tokens,
        width=sizes,
        routing=st.sampled_from(ROUTINGS),
        grouped=st.booleans(),
        dtype=st.sampled_from(DTYPES[1:]),
        gates=st.sampled_from((None, torch.float32, torch.bfloat16)),
        rows_layout=st.sampled_from(LAYOUTS),
        grad_layout=st.sampled_from(LAYOUTS),
        grads=subsets("rows", "gates"),
        device=devices,
    ),
    choice=choices(),
)
def test_combine(case: Combine, choice: tuple[int, int]) -> None:
    check(dataclasses.replace(case, experts=choice[0], top_k=choice[1]))


@settings(max_examples=EXAMPLES)
@given(
    case=st.builds(
        Mlp,
        tokens=tokens,
        hidden=sizes,
        width=sizes,
        n_out=st.one_of(st.none(), sizes),
        activation=st.sampled_from(reference.ACTIVATIONS),
        glu_layout=st.sampled_from(reference.GLU_LAYOUTS),
        routing=st.sampled_from(ROUTINGS),
        biases=subsets("b_up", "b_down"),
        dtype=st.sampled_from(DTYPES),
        x_layout=st.sampled_from(LAYOUTS),
        weight_layout=st.sampled_from(WEIGHT_LAYOUTS),
        grad_layout=st.sampled_from(LAYOUTS),
        grads=subsets("x", "w_up", "b_up", "w_down", "b_down", "gates"),
        recompute=st.booleans(),
        device=devices,
    ),
    choice=choices(),
)
def test_moe_mlp(case: Mlp, choice: tuple[int, int]) -> None:
    check(dataclasses.replace(case, experts=choice[0], top_k=choice[1]))


@settings(max_examples=EXAMPLES)
@given(
    case=st.builds(
        Gating,
        tokens=tokens,
        scoring=st.sampled_from(("softmax", "sigmoid")),
        normalize=st.booleans(),
        selection_bias=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        device=devices,
    ),
    choice=choices(),
)
def test_topk_gating(case: Gating, choice: tuple[int, int]) -> None:
    check(dataclasses.replace(case, experts=choice[0], k=min(choice)))


@settings(max_examples=100)
@given(ids_of(), devices)
def test_routing_is_a_permutation_sorted_by_expert(ids_and_experts: tuple[torch.Tensor, int], device: str) -> None:
    ids, e = ids_and_experts
    routing = scattermoe.route(ids.to(device), e)
    order, position, offsets = reference.group(ids, e)
    assert sorted(routing.slot_order.tolist()) == list(range(ids.numel()))
    assert routing.slot_order.tolist() == order
    assert routing.expert_offsets.tolist() == offsets
    live = offsets[-1]
    assert routing.slot_position.flatten().tolist() == [p if p < live else -1 for p in position]


@settings(max_examples=60)
@given(ids_of(), devices, st.booleans())
def test_linear_and_combine_undo_the_routing(
    ids_and_experts: tuple[torch.Tensor, int], device: str, grouped: bool
) -> None:
    # Identity weights and unit gates: every token comes back as often as it has live slots, exactly.
    ids, e = ids_and_experts
    routing = scattermoe.route(ids.to(device), e)
    x = torch.randint(-8, 8, (ids.size(0), 5), device=device).float()
    rows = scattermoe.parallel_linear(x, torch.eye(5, device=device).expand(e, 5, 5), routing, grouped_out=grouped)
    live = ((ids >= 0) & (ids < e)).sum(1, keepdim=True).to(device)
    assert torch.equal(scattermoe.combine(rows, None, routing, grouped=grouped), x * live)


@settings(max_examples=60)
@given(ids_of(), devices)
def test_four_layouts_are_one_function(ids_and_experts: tuple[torch.Tensor, int], device: str) -> None:
    ids, e = ids_and_experts
    routing = scattermoe.route(ids.to(device), e)
    order = routing.slot_order.long()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ids.numel(), 4, generator=generator, dtype=torch.float64).to(device)
    weight = torch.randn(e, 3, 4, generator=generator, dtype=torch.float64).to(device)
    linear = torch.ops.scattermoe.parallel_linear
    args = (weight, None, routing.slot_order, routing.expert_offsets, 1)
    base = linear(x, *args, False, False)
    torch.testing.assert_close(linear(x, *args, False, True), base[order])
    torch.testing.assert_close(linear(x[order], *args, True, False), base)
    torch.testing.assert_close(linear(x[order], *args, True, True), base[order])


@settings(max_examples=60)
@given(ids_of(), devices)
def test_linear_in_x_and_in_the_gates(ids_and_experts: tuple[torch.Tensor, int], device: str) -> None:
    ids, e = ids_and_experts
    routing = scattermoe.route(ids.to(device), e)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    x, w_up, w_down, gates = normal(ids.size(0), 4), normal(e, 6, 4), normal(e, 5, 3), normal(*ids.shape)
    y = scattermoe.moe_mlp(x, w_up, w_down, gates, routing)
    torch.testing.assert_close(scattermoe.moe_mlp(x, w_up, w_down, 3 * gates, routing), 3 * y)
    torch.testing.assert_close(scattermoe.moe_mlp(x, w_up, 2 * w_down, gates, routing), 2 * y)
    swapped = torch.cat([w_up[:, 3:], w_up[:, :3]], dim=1)
    torch.testing.assert_close(scattermoe.moe_mlp(x, swapped, w_down, gates, routing, glu_layout="up_gate"), y)
    woven = torch.stack([w_up[:, :3], w_up[:, 3:]], dim=2).flatten(1, 2)
    torch.testing.assert_close(scattermoe.moe_mlp(x, woven, w_down, gates, routing, glu_layout="interleaved"), y)


@settings(max_examples=40)
@given(ids_of(), devices)
def test_an_expert_twice_counts_twice(ids_and_experts: tuple[torch.Tensor, int], device: str) -> None:
    ids, e = ids_and_experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ids.size(0), 4, generator=generator, dtype=torch.float64).to(device)
    w_up = torch.randn(e, 6, 4, generator=generator, dtype=torch.float64).to(device)
    w_down = torch.randn(e, 4, 3, generator=generator, dtype=torch.float64).to(device)
    gates = torch.rand(ids.shape, generator=generator, dtype=torch.float64).to(device)
    once = scattermoe.moe_mlp(x, w_up, w_down, gates, scattermoe.route(ids.to(device), e))
    twice = scattermoe.moe_mlp(
        x, w_up, w_down, torch.cat([gates, gates], 1), scattermoe.route(torch.cat([ids, ids], 1).to(device), e)
    )
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize("count", EXPERT_COUNTS)
def test_top_k_up_to_every_expert(device: str, count: int) -> None:
    for k in {1, 2, count // 2, count - 1, count, count + 1} - {0, -1}:
        ids = torch.arange(k, device=device).remainder(count).repeat(2, 1)
        routing = scattermoe.route(ids, count)
        y = scattermoe.combine(torch.ones(2 * k, 1, dtype=torch.float64, device=device), None, routing)
        assert y.flatten().tolist() == [k, k]
