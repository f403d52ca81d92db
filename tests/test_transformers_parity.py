"""Tiny models of transformers on its own experts and on ours: the same logits, gradients and generated tokens."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import PreTrainedModel

import scattermoe.transformers  # noqa: F401  (registers itself, after the check that transformers is there)
from tests import parity


def pair(name: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel, int]:
    """A model and a copy of it on our experts, and how many expert layers it has."""
    model = parity.build(name, device, dtype)
    swapped = parity.swapped_copy(model, lambda twin: twin.set_experts_implementation("scattermoe"))
    layers = sum(hasattr(module, "is_concatenated") for module in model.modules())
    assert layers > 0
    return model, swapped, layers


def kernel_dtypes(step: parity.Step) -> list[torch.dtype]:
    """In what the fused operator computed, call by call."""
    return [args[0].dtype for operator, args in step.calls.seen if operator == "_moe_mlp_forward"]


@pytest.mark.parametrize("name", parity.INTERFACE)
def test_training_step_and_generation(device: str, name: str) -> None:
    model, swapped, layers = pair(name, device)
    for padding in (None, "left", "right"):
        step = parity.assert_same_training_step(model, swapped, parity.batch(model, padding))
        # Every activation among these models is one that the operator fuses.
        assert [step.calls.count(op) for op in ("_moe_mlp_forward", "_moe_mlp_backward")] == [layers, layers]
    tokens = 8
    calls = parity.assert_same_generation(model, swapped, tokens)
    assert calls.count("moe_mlp") == layers * tokens


@pytest.mark.parametrize("name", parity.INTERFACE)
def test_training_step_in_bfloat16(device: str, name: str) -> None:
    model, swapped, layers = pair(name, device, torch.bfloat16)
    step = parity.assert_same_training_step(model, swapped, parity.batch(model, "left"))
    assert kernel_dtypes(step) == [torch.bfloat16] * layers


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_autocast_with_float32_weights(device: str, name: str) -> None:
    model, swapped, layers = pair(name, device)
    step = parity.assert_same_training_step(model, swapped, parity.batch(model, "left"), autocast=torch.bfloat16)
    assert kernel_dtypes(step) == [torch.bfloat16] * layers
    assert {gradient.dtype for gradient in step.gradients.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoehybrid"])
def test_gradient_checkpointing(device: str, name: str) -> None:
    model, swapped, layers = pair(name, device)
    model.train()
    swapped.train()
    swapped.gradient_checkpointing_enable()
    step = parity.assert_same_training_step(model, swapped, parity.batch(model, "left"))
    assert step.calls.count("_moe_mlp_forward") == 2 * layers
