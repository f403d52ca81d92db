"""The activations of an expert: their names, how to recognise a callable among them, and each in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Gated activations take [gate, up] pairs: the up-projection has two rows for every column of the down-projection.
GATED_ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped")
PLAIN_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
GLU_LAYOUTS = ("gate_up", "up_gate", "interleaved")

_GATE_OF = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
_GATED_BY = {gate: gated for gated, gate in _GATE_OF.items()}

# Only functions that take no option are listed: a callable is recognised when it is surely the same function.
_FUNCTIONS = {
    F.silu: "silu",
    F.gelu: "gelu",
    F.relu: "relu",
    torch.relu: "relu",
}
# Modules by their class's full name, which a library that need not be there can have as well.
_MODULES = {
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.linear.Identity": "identity",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.ReLUSquaredActivation": "relu2",
    "transformers.activations.LinearActivation": "identity",
}
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "identity": lambda z: z,
}


def is_gated(activation: str) -> bool:
    """Tell whether an activation takes pairs of gate and up values.

    Args:
        activation: a name out of ``GATED_ACTIVATIONS`` or ``PLAIN_ACTIVATIONS``.

    Returns:
        True for a gated activation, whose up-projection has twice the rows.

    Raises:
        ValueError: the name is not known; the message lists the known ones.

    Example::

        >>> from scattermoe.activations import is_gated
        >>> is_gated("swiglu"), is_gated("gelu")
        (True, False)
    """
    if activation in GATED_ACTIVATIONS:
        return True
    if activation in PLAIN_ACTIVATIONS:
        return False
    known = ", ".join(GATED_ACTIVATIONS + PLAIN_ACTIVATIONS)
    raise ValueError(f"expected activation to be one of {known}, got {activation!r}")


def check_glu_layout(glu_layout: str) -> None:
    """Raise a ValueError naming the known layouts unless ``glu_layout`` is one of ``GLU_LAYOUTS``.

    Args:
        glu_layout: the order of a gated up-projection's rows.

    Raises:
        ValueError: the layout is not known.

    Example::

        >>> from scattermoe.activations import check_glu_layout
        >>> check_glu_layout("gate_up")
    """
    if glu_layout not in GLU_LAYOUTS:
        raise ValueError(f"expected glu_layout to be one of {', '.join(GLU_LAYOUTS)}, got {glu_layout!r}")


def activation_name(activation: Callable[[Tensor], Tensor], gated: bool = False) -> str | None:
    """Find the fused activation that computes the same function as a callable.

    Args:
        activation: an ``nn.Module`` or function of one tensor.
        gated: the callable is applied to the gate half of a gated linear unit.

    Returns:
        The operator's name for it (``"silu"``, or ``"swiglu"`` when gated), or None when the callable is not surely one
        of the known functions: a subclass, a module with hooks, a lambda.

    Example::

        >>> import torch
        >>> from torch import nn
        >>> from scattermoe.activations import activation_name
        >>> activation_name(nn.SiLU(), gated=True), activation_name(nn.GELU("tanh")), activation_name(torch.tanh)
        ('swiglu', 'gelu_tanh', None)
    """
    name = None
    if isinstance(activation, nn.Module):
        name = _module_name(activation)
    elif isinstance(activation, functools.partial):
        if activation.func is F.gelu and not activation.args:
            name = {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.keywords.get("approximate", "none"))
            name = name if set(activation.keywords) <= {"approximate"} else None
    else:
        try:
            name = _FUNCTIONS.get(activation)
        except TypeError:  # not hashable, so none of ours
            name = None
    if gated and name is not None:
        name = _GATED_BY.get(name)
    return name


def has_hooks(module: nn.Module) -> bool:
    """Tell whether something waits for a module to be called.

    Args:
        module: any module; its children are not looked at.

    Returns:
        True if it has forward or backward hooks of any kind.

    Example::

        >>> from torch import nn
        >>> from scattermoe.activations import has_hooks
        >>> has_hooks(nn.SiLU())
        False
    """
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _module_name(module: nn.Module) -> str | None:
    # A hook must see its module called, and a subclass may compute anything.
    if has_hooks(module):
        return None
    kind = type(module)
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return _MODULES.get(f"{kind.__module__}.{kind.__qualname__}")


def apply_activation(
    z: Tensor,
    activation: str,
    glu_layout: str = "gate_up",
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """Apply a named activation in plain PyTorch, for layers outside the fused operator such as a shared expert.

    Args:
        z: pre-activations ``[..., I]``, or ``[..., 2I]`` for a gated activation; a floating dtype.
        activation: a name out of ``GATED_ACTIVATIONS`` or ``PLAIN_ACTIVATIONS``.
        glu_layout: where a gated activation finds its halves: ``"gate_up"``, ``"up_gate"`` or ``"interleaved"``.
        alpha: slope inside the sigmoid of ``"swiglu_clamped"``.
        limit: clamp of ``"swiglu_clamped"``.

    Returns:
        ``[..., I]`` in z's dtype.

    Raises:
        ValueError: unknown activation or layout.

    Example::

        >>> import torch
        >>> from scattermoe.activations import apply_activation
        >>> apply_activation(torch.tensor([-1.0, 2.0]), "relu2")
        tensor([0., 4.])

    Source: GLU variants, https://arxiv.org/abs/2002.05202; squared ReLU, https://arxiv.org/abs/2109.08668.
    """
    if not is_gated(activation):
        return _PLAIN[activation](z)
    check_glu_layout(glu_layout)
    if glu_layout == "interleaved":
        gate, up = z[..., ::2], z[..., 1::2]
    else:
        gate, up = z.chunk(2, dim=-1)
        if glu_layout == "up_gate":
            gate, up = up, gate
    return apply_glu(gate, up, activation, alpha, limit)


def apply_glu(gate: Tensor, up: Tensor, activation: str, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """Apply a gated activation to gate and up values that lie in tensors of their own.

    Args:
        gate: ``[..., I]``, a floating dtype.
        up: ``[..., I]``.
        activation: a name out of ``GATED_ACTIVATIONS``.
        alpha: slope inside the sigmoid of ``"swiglu_clamped"``.
        limit: clamp of ``"swiglu_clamped"``.

    Returns:
        ``[..., I]``.

    Raises:
        ValueError: the activation is not a gated one.

    Example::

        >>> import torch
        >>> from scattermoe.activations import apply_glu
        >>> apply_glu(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 3.0]), "reglu")
        tensor([0., 6.])

    Source: GLU variants, https://arxiv.org/abs/2002.05202; the clamped variant: gpt-oss, https://arxiv.org/abs/2508.10925.
    """
    if activation not in GATED_ACTIVATIONS:
        raise ValueError(f"expected activation to be one of {', '.join(GATED_ACTIVATIONS)}, got {activation!r}")
    if activation == "swiglu_clamped":
        gate = gate.clamp(max=limit)
        up = up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    return _PLAIN[_GATE_OF[activation]](gate) * up
