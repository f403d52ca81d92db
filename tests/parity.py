"""A transformers model before and after its experts were swapped: the same numbers, from kernels that really ran.

    swapped = parity.swapped_copy(model, lambda copy: copy.set_experts_implementation("scattermoe"))
    parity.assert_same_training_step(model, swapped, parity.batch(model, "left"))
    parity.assert_same_generation(model, swapped)

A swap is any function that changes a model in place. Build the model with another dtype and it is compared in that. Gradients
are compared under the keys of the original's state dict, in whatever parameters the swapped model keeps them: a swap may stack,
transpose or rename weights as long as its state dict is the original's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from tests.modes import Calls
from tests.tolerances import low_precision_bound, model_bound, relative_error

VOCABULARY = 64
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}

# What makes each model tiny, beside `_COMMON`: two layers that show every kind of layer it has, and experts in at least one.
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_local_experts": 8, "moe_intermediate_size": 24, "head_dim": 8},
    "qwen3_next": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 4, "num_key_value_heads": 4},
    "deepseek_v2": {
        **_MLA,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "deepseek_v3": {
        **_MLA,
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "granitemoe": {"num_local_experts": 4},
    "granitemoehybrid": {
        **_MAMBA2,
        "num_local_experts": 4,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention"],
    },
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 24},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 40, "head_dim": 8},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "phimoe": {"num_local_experts": 4},
    "glm4_moe": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
    },
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "minimax_m2": {"num_local_experts": 8, "head_dim": 8},
    "jamba": {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "use_mamba_kernels": False,
    },
}
# The models whose experts stand behind transformers' experts interface; the others are for scattermoe.replace_moe.
# No experts interface: for `replace_moe`.
OUTSIDE = ("jetmoe", "llama4_text", "dbrx", "aria_text")
INTERFACE = tuple(name for name in CONFIGS if name not in OUTSIDE)

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def config(name: str, **changes: Any) -> transformers.PretrainedConfig:
    """A tiny configuration of a model type, with some entries changed."""
    arguments = {**_COMMON, **CONFIGS[name], **changes}
    if name == "nemotron_h":  # counts its layers itself
        del arguments["num_hidden_layers"]
    return transformers.AutoConfig.for_model(name, **arguments)


def build(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A tiny model with random weights whose every layer, expert and bias matters, on the plain code of transformers."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config(name, **changes), attn_implementation="eager", experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() >= 2 and tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5)
            elif key.endswith(("bias", "bias_e", "moe_statics")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.to(device, dtype).eval()


def batch(model: PreTrainedModel, padding: str | None = None, length: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Three random sequences with labels; with `padding` (``left`` or ``right``) they are of three lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding is not None:
        for row, short in enumerate((0, 3, 6)):
            mask[row, slice(None, short) if padding == "left" else slice(length - short, None)] = 0
    ids = ids * mask  # the padding token is 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}
    return {key: value.to(model.device) for key, value in inputs.items()}


def swapped_copy(model: PreTrainedModel, swap: Callable[[PreTrainedModel], Any]) -> PreTrainedModel:
    """A copy of the model with its own weights, after the swap; the model itself stays as it is."""
    twin = copy.deepcopy(model)
    swap(twin)
    return twin


class Routing(TorchFunctionMode):
    """Remembers every top-k choice of the first model that runs in it and makes the next ones choose the same.

    In half precision two equally right models differ by a rounding, a router tips over, and all that follows compares
    different experts. What is compared under this mode is the arithmetic alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[Tensor] = []
        self.replayed: int | None = None

    def replay(self) -> None:
        self.replayed = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        gating = torch.ops.scattermoe.topk_gating
        if func not in (torch.topk, torch.Tensor.topk, gating):
            return func(*args, **kwargs)
        if self.replayed is None:
            result = func(*args, **kwargs)
            self.chosen.append(result[1])
            return result
        indices = self.chosen[self.replayed]
        self.replayed += 1
        if func is not gating:
            return torch.return_types.topk((args[0].gather(kwargs.get("dim", -1), indices), indices))
        logits, _, scoring, normalize, _, _, _, scale = args
        scores = logits.float().softmax(-1) if scoring == "softmax" else logits.float().sigmoid()
        gates = scores.gather(-1, indices)
        return scale * (gates / gates.sum(-1, keepdim=True) if normalize else gates), indices


class Step(NamedTuple):
    """What one forward and backward pass gave."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    calls: Calls


def training_step(model: PreTrainedModel, inputs: dict[str, Tensor], autocast: torch.dtype | None = None) -> Step:
    """One forward and backward pass; logits of the real tokens alone, gradients under the keys of the state dict."""
    model.zero_grad()
    with Calls() as calls:
        with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
            output = model(**inputs)
        output.loss.backward()
    real = inputs["attention_mask"] == 1
    return Step(output.logits[real].detach(), output.loss.detach(), gradients(model), calls)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, zeros where it has none, as the state dict would store it."""
    parameters = list(model.parameters())
    values = [parameter.data for parameter in parameters]
    buffers = {key for key, _ in model.named_buffers()}
    try:
        for parameter in parameters:
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return {key: value.clone() for key, value in model.state_dict().items() if key not in buffers}
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value


def assert_same_training_step(
    model: PreTrainedModel, swapped: PreTrainedModel, inputs: dict[str, Tensor], autocast: torch.dtype | None = None
) -> Step:
    """Logits, loss and every gradient agree; returns the swapped model's step, for its calls of the library's operators.

    Models in float32 must agree with each other, to the bound of their size or to what each may be away from float64. In half
    precision, or under autocast, both are compared with the same weights in float32, and the swapped model may hardly be
    further away than the other one is.
    """
    if autocast is None and model.dtype == torch.float32:
        want, got = training_step(model, inputs), training_step(swapped, inputs)
        limit = model_bound(model.config.hidden_size, model.config.num_hidden_layers)
        errors = {key: (error, limit) for key, error in _errors(got, want).items()}
        if any(error > limit for error, limit in errors.values()):
            # Some parameters' gradients are nearly cancelling sums, and differ more between any two right models.
            peers = _own_errors(model, inputs)
            errors = {key: (error, max(limit, 2.0 * peers[key])) for key, (error, limit) in errors.items()}
    else:
        routing = Routing()
        with routing:
            exact = training_step(copy.deepcopy(model).float(), inputs)
            routing.replay()
            want = training_step(model, inputs, autocast)
            routing.replay()
            got = training_step(swapped, inputs, autocast)
        peers = _errors(want, exact)
        errors = {
            key: (error, low_precision_bound(autocast or model.dtype, peers[key]))
            for key, error in _errors(got, exact).items()
        }
    wrong = {key: f"{error:.3g} above {limit:.3g}" for key, (error, limit) in errors.items() if not error <= limit}
    assert not wrong, f"relative errors: {wrong}"
    assert want.gradients.keys() == got.gradients.keys()
    assert not want.calls.seen and got.calls.seen, "the library's operators run in the swapped model, and there alone"
    return got


def _own_errors(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, float]:
    """How far a float32 model is from its own weights in float64, with the same experts chosen.

    The largest of a few runs, whose weights differ by a rounding: one run can be near by luck.
    """
    # Padding goes behind the tokens: attention in float64 makes NaN of queries that see nothing.
    order = inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
    inputs = {key: value.gather(1, order) for key, value in inputs.items()}
    generator = torch.Generator(model.device).manual_seed(0)
    routing = Routing()
    with routing:
        exact = training_step(copy.deepcopy(model).double(), inputs)
        runs = []
        for _ in range(3):
            twin = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in twin.parameters():
                    noise = torch.rand(parameter.shape, generator=generator, device=parameter.device) - 0.5
                    parameter.mul_(1.0 + torch.finfo(torch.float32).eps * noise)
            routing.replay()
            runs.append(_errors(training_step(twin, inputs), exact))
    errors = {key: max(run[key] for run in runs) for key in runs[0]}
    assert all(map(math.isfinite, errors.values())), errors
    return errors


def _errors(step: Step, reference: Step) -> dict[str, float]:
    errors = {
        "logits": relative_error(step.logits, reference.logits),
        "loss": relative_error(step.loss, reference.loss),
    }
    return errors | {key: relative_error(step.gradients[key], value) for key, value in reference.gradients.items()}


def assert_same_generation(model: PreTrainedModel, swapped: PreTrainedModel, tokens: int = 8) -> Calls:
    """Greedy decoding of a padded batch with a KV cache gives the same tokens; returns the calls of the library's operators."""
    inputs = batch(model, "left")
    del inputs["labels"]
    options = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True}
    want = model.generate(**inputs, **options)
    with Calls() as calls:
        got = swapped.generate(**inputs, **options)
    assert want.shape == (3, inputs["input_ids"].shape[1] + tokens)
    assert torch.equal(got, want)
    assert calls.seen, "the library's operators run in the swapped model"
    return calls
