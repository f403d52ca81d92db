"""torch.library.opcheck on every operator: schema, autograd registration, fake tensors, AOT dispatch with dynamic shapes."""

from typing import Any

import pytest
import torch

from tests.conftest import DEVICES
from tests.samples import op_named, op_samples

SAMPLES = [(device, *sample) for device in DEVICES for sample in op_samples(device)]
OPS = {
    "group_by_expert",
    "parallel_linear",
    "_parallel_linear_backward",
    "combine",
    "_combine_backward",
    "moe_mlp",
    "_moe_mlp_forward",
    "_moe_mlp_backward",
    "_activation",
    "_activation_backward",
    "_moe_mlp_backward_over_z",
    "topk_gating",
    "_topk_gating_backward",
}


def test_every_operator_has_samples() -> None:
    counts = {op: sum(s[1] == op for s in SAMPLES) for op in OPS}
    assert min(counts.values()) >= 3, counts
    assert {s[1] for s in SAMPLES} == OPS


def test_no_operator_is_forgotten() -> None:
    registered = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("scattermoe::")
    }
    assert registered == OPS


@pytest.mark.parametrize("device, op, label, args", SAMPLES, ids=[f"{s[0]}-{s[1]}-{s[2]}" for s in SAMPLES])
def test_opcheck(device: str, op: str, label: str, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(op_named(op), args)


@pytest.mark.parametrize("op", sorted(OPS))
def test_pt2_compliant(op: str) -> None:
    assert torch.Tag.pt2_compliant_tag in op_named(op).tags
