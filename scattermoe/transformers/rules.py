"""Which experts modules of a transformers model can be served, and why another cannot."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..functional import DTYPES
from ..replace.interface import is_switched, takes_interface, weight_names
from .experts import DEFAULT_GATE, bias_names, gate_name

__all__ = ["broken_rule", "check", "experts_modules"]


def check(model: nn.Module) -> None:
    """Raise unless every experts module of a model that is set to ``"scattermoe"`` can be served.

    ``set_experts_implementation``, ``from_pretrained`` and ``from_config`` call it by themselves.

    Args:
        model: any module.

    Raises:
        ValueError: the first module that cannot be served, by its path in the model, and the rule that it breaks.

    Example::

        >>> import transformers, scattermoe.transformers
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> model = transformers.MixtralModel(transformers.MixtralConfig(**sizes, num_key_value_heads=2))
        >>> model.set_experts_implementation("scattermoe")
        >>> scattermoe.transformers.check(model)
    """
    for path, module in experts_modules(model):
        broken = broken_rule(module)
        if broken is not None:
            raise ValueError(f"{path or 'the model'} ({type(module).__name__}) cannot run on scattermoe: {broken}")


def broken_rule(experts: nn.Module) -> str | None:
    """Say why an experts module cannot be served.

    Args:
        experts: a module of a class decorated with ``transformers.integrations.use_experts_implementation``.

    Returns:
        The first rule that it breaks, as the end of a sentence; None if :func:`experts_forward` computes it.

    Example::

        >>> import transformers, scattermoe.transformers
        >>> config = transformers.MixtralConfig(hidden_size=16, intermediate_size=32, num_local_experts=4)
        >>> experts = transformers.models.mixtral.modeling_mixtral.MixtralExperts(config)
        >>> scattermoe.transformers.broken_rule(experts) is None
        True
    """
    weights = weight_names(experts)
    for name in (*weights, *(bias_names(experts) if experts.has_bias else ()), "num_experts"):
        if getattr(experts, name, None) is None:
            return f"it has no {name}"
    default_gate = experts.has_gate and gate_name(experts) == DEFAULT_GATE
    if (default_gate or not experts.has_gate) and not callable(getattr(experts, "act_fn", None)):
        return "its activation act_fn is missing or cannot be called"
    if default_gate and not experts.is_concatenated:
        return "is_concatenated=False says that gate and up rows are interleaved, but it has no _apply_gate that splits them so"
    for name, parameter in experts.named_parameters(recurse=False):
        plain = type(parameter) in (nn.Parameter, Tensor) or isinstance(parameter, DTensor)
        if parameter.dtype not in DTYPES or not plain:
            kind = parameter.dtype if plain else f"{type(parameter).__name__} of {parameter.dtype}"
            return f"{name} is quantised ({kind}); weights must be float64, float32, bfloat16 or float16"
    up, down = (getattr(experts, name) for name in weights)
    if isinstance(up, DTensor) or up.numel() == 0:
        return None  # sharded: its shape is not the one that the forward pass will see
    for name in weights:
        if getattr(experts, name).dim() != 3:
            return f"{name} must be [experts, out, in] or transposed, got shape {list(getattr(experts, name).shape)}"
    inner = (up.shape[2], down.shape[1]) if experts.is_transposed else (up.shape[1], down.shape[2])
    if not up.shape[0] == down.shape[0] == experts.num_experts:
        return (
            f"num_experts is {experts.num_experts}, but {weights[0]} has {up.shape[0]} and {weights[1]} {down.shape[0]}"
        )
    if inner[0] != inner[1] * (2 if experts.has_gate else 1):
        return f"{weights[0]} gives {inner[0]} values, which does not fit the {inner[1]} that {weights[1]} takes"
    return None


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules, with their paths, that look up their implementation and find "scattermoe"."""
    for path, module in model.named_modules():
        if takes_interface(module) and is_switched(module):
            yield path, module
