"""group_by_expert: a stable sort of the slots by expert, as indices."""

import pytest
import torch

import scattermoe
from tests import reference
from tests.cases import EXPERT_COUNTS, ROUTINGS, make_ids


def check(ids: torch.Tensor, experts: int) -> None:
    routing = scattermoe.route(ids, experts)
    order, position, offsets = reference.group(ids, experts)
    live = offsets[-1]
    assert routing.slot_order.tolist() == order
    # Sentinels have no place in any group.
    assert routing.slot_position.flatten().tolist() == [p if p < live else -1 for p in position]
    assert routing.expert_offsets.tolist() == offsets
    assert routing.slot_position.shape == (ids.size(0), 1 if ids.dim() == 1 else ids.size(1))
    for tensor in routing:
        assert tensor.dtype == torch.int32
        assert tensor.device == ids.device
        assert tensor.is_contiguous()
    assert routing.num_tokens == ids.size(0)
    assert routing.top_k == (1 if ids.dim() == 1 else ids.size(1))
    assert routing.num_experts == experts


@pytest.mark.parametrize("experts", EXPERT_COUNTS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(device: str, experts: int, routing: str) -> None:
    check(make_ids(37, 3, experts, routing, experts).to(device), experts)


@pytest.mark.parametrize("tokens", [0, 1, 2, 1000])
@pytest.mark.parametrize("top_k", [1, 8])
def test_sizes(device: str, tokens: int, top_k: int) -> None:
    check(make_ids(tokens, top_k, 60, "uniform", 1).to(device), 60)
    check(make_ids(tokens, top_k, 60, "sentinels", 1).to(device), 60)


def test_more_choices_than_experts(device: str) -> None:
    check(make_ids(9, 7, 3, "uniform", 2).to(device), 3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_id_dtypes(device: str, dtype: torch.dtype) -> None:
    check(make_ids(20, 2, 60, "uniform", 3, dtype).to(device), 60)


def test_ids_that_an_int32_cannot_hold_are_sentinels(device: str) -> None:
    check(torch.tensor([[1, 2**32 + 1], [-(2**32) + 1, 2**62], [0, -(2**63)]], device=device), 3)


def test_flat_ids(device: str) -> None:
    ids = make_ids(21, 1, 5, "sentinels", 4).reshape(-1).to(device)
    check(ids, 5)
    # The operator keeps the shape it was given.
    assert torch.ops.scattermoe.group_by_expert(ids, 5)[1].shape == (21,)


def test_non_contiguous_ids(device: str) -> None:
    ids = make_ids(3, 20, 5, "sentinels", 5).to(device).t()
    assert not ids.is_contiguous()
    check(ids, 5)
    check(make_ids(20, 8, 5, "uniform", 6).to(device)[:, ::3], 5)
    check(make_ids(1, 4, 5, "uniform", 7).to(device).expand(6, 4), 5)


def test_no_alias_of_the_input(device: str) -> None:
    for ids in (torch.zeros(4, 2, dtype=torch.int32, device=device), torch.zeros(4, dtype=torch.int32, device=device)):
        pointers = {t.untyped_storage().data_ptr() for t in scattermoe.route(ids, 1)}
        assert len(pointers) == 3
        assert ids.untyped_storage().data_ptr() not in pointers


@pytest.mark.slow
def test_many_slots(device: str) -> None:
    check(make_ids(40_000, 2, 129, "skewed", 8).to(device), 129)


def test_routing_is_a_pytree(device: str) -> None:
    routing = scattermoe.route(torch.zeros(4, 2, dtype=torch.int64, device=device), 2)
    leaves, spec = torch.utils._pytree.tree_flatten(routing)
    assert len(leaves) == 3
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), scattermoe.Routing)
