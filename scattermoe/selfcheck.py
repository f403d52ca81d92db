"""A quick check of every operator on this machine against plain per-token loops in float64.

The test suite is the thorough one; this is for a user in doubt about an installation, so it takes seconds, needs nothing but
PyTorch, and shows numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional
from .functional import DTYPES

TOKENS, TOP_K, EXPERTS, HIDDEN, INTERMEDIATE = 24, 3, 6, 40, 24

# Smooth ones in every dtype; a kink would turn a rounding of its argument into an error of any size in the gradient.
ACTIVATIONS = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "identity": lambda v: v,
}
KINKED_ACTIVATIONS = {
    "reglu": F.relu,
    "relu": F.relu,
    "relu2": lambda v: F.relu(v).square(),
    "swiglu_clamped": None,
}


class Result(NamedTuple):
    """One compared tensor: its error, the bound for it, and what it is; `problem` is the message of an op that failed."""

    op: str
    tensor: str
    dtype: torch.dtype
    error: float
    bound: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the op ran and the error is within the bound; an error of NaN is not."""
        return not self.problem and self.error <= self.bound


class _Expected(NamedTuple):
    name: str
    actual: Tensor
    reference: Tensor
    length: int  # terms of the longest sum on the way
    roundings: int  # results on the way that may be stored in the dtype


def row_error(actual: Tensor, reference: Tensor) -> float:
    """Measures how far a tensor is from its reference.

    Args:
        actual: any shape, floating dtype and device.
        reference: the same shape, float64.

    Returns:
        The largest Euclidean distance between two rows (vectors along the last dimension) over the length of the reference's
        row; a row shorter than a quarter of the typical one counts as that long, and a reference row of zeros must be met
        exactly. Infinite where the actual tensor has a NaN.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> import torch
        >>> from scattermoe.selfcheck import row_error
        >>> row_error(torch.tensor([[3.0, 4.5]]), torch.tensor([[3.0, 4.0]], dtype=torch.float64))
        0.1
    """
    if actual.shape != reference.shape:
        raise ValueError(f"expected shape {tuple(reference.shape)}, got {tuple(actual.shape)}")
    actual = actual.detach().to("cpu", torch.float64).reshape(-1, actual.shape[-1])
    reference = reference.detach().reshape(actual.shape)
    length = reference.norm(dim=1)
    distance = (actual - reference).norm(dim=1)
    zero = length == 0
    if bool(actual.isnan().any()) or bool((distance[zero] > 0).any()):
        return math.inf
    if bool(zero.all()):
        return 0.0
    typical = length[~zero].square().mean().sqrt()
    return float((distance / length.clamp_min(0.25 * typical))[~zero].max())


def _bound(dtype: torch.dtype, length: int, roundings: int) -> float:
    """Rounding errors of a random sum grow with the square root of its length; each stored result adds one rounding. The
    factor 4 leads from a typical row to the worst of all."""
    unit = torch.finfo(dtype).eps / 2
    accumulator = unit if dtype == torch.float64 else torch.finfo(torch.float32).eps / 2
    return 4 * (accumulator * math.sqrt(length) + roundings * unit)


class _Inputs:
    """Inputs of one check, as leaves on the device and as float64 leaves of the same values for the reference."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device
        self.tested: dict[str, Tensor] = {}
        self.exact: dict[str, Tensor] = {}

    def make(self, name: str, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> None:
        values = (torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale).to(dtype or self.dtype)
        # Copies: a float64 leaf on the CPU must not be the reference's leaf as well.
        self.tested[name] = values.to(self.device, copy=True).requires_grad_()
        self.exact[name] = values.to(torch.float64, copy=True).requires_grad_()

    def compare(self, actual: Tensor, reference: Tensor, length: int, roundings: dict[str, int]) -> Iterator[_Expected]:
        """Compares a result and, for a random gradient of it, the gradients of every input."""
        yield _Expected("y", actual, reference, length, roundings["y"])
        grad = torch.randn(reference.shape, generator=self.generator, dtype=torch.float64).to(actual.dtype)
        actual.backward(grad.to(self.device))
        reference.backward(grad.double())
        for name, leaf in self.exact.items():
            got = self.tested[name].grad
            if got is None:
                raise RuntimeError(f"no gradient for {name}")
            yield _Expected(f"grad {name}", got, leaf.grad, length, roundings.get(name, roundings["y"] + 1))


def _expert_ids() -> Tensor:
    """A routing with a sentinel (-1), an expert without tokens and one that a token chose twice."""
    ids = torch.randint(0, EXPERTS - 1, (TOKENS, TOP_K), generator=torch.Generator().manual_seed(1))
    ids[3, 1] = -1
    ids[7, 2] = ids[7, 0]
    return ids


def _slots(ids: Tensor) -> list[tuple[int, int, int]]:
    """(token, slot, expert) of every slot that is in a group."""
    flat = [(s // TOP_K, s, e) for s, e in enumerate(ids.flatten().tolist())]
    return [entry for entry in flat if 0 <= entry[2] < EXPERTS]


def _grouped_order(ids: Tensor) -> list[int]:
    """The slot at each grouped position, sentinels last."""
    return sorted(range(ids.numel()), key=lambda s: (ids.flatten()[s] < 0, ids.flatten()[s]))


def _check_grouping(dtype: torch.dtype, device: torch.device) -> Iterator[_Expected]:
    ids = _expert_ids()
    routing = functional.route(ids.to(device), EXPERTS)
    order = _grouped_order(ids)
    position = torch.empty(ids.numel(), dtype=torch.float64)
    position[order] = torch.arange(ids.numel(), dtype=torch.float64)
    position[ids.flatten() < 0] = -1
    offsets = [int((ids < e).sum() - (ids < 0).sum()) for e in range(EXPERTS + 1)]
    for name, actual, reference in (
        ("slot_order", routing.slot_order, torch.tensor(order, dtype=torch.float64)),
        ("slot_position", routing.slot_position.flatten(), position),
        ("expert_offsets", routing.expert_offsets, torch.tensor(offsets, dtype=torch.float64)),
    ):
        # One number a row: a single wrong index is an error of its own.
        yield _Expected(name, actual[:, None], reference[:, None], 0, 0)


def _check_linear(dtype: torch.dtype, device: torch.device) -> Iterator[_Expected]:
    ids = _expert_ids()
    routing = functional.route(ids.to(device), EXPERTS)
    order = _grouped_order(ids)
    for grouped_in in (False, True):
        for grouped_out in (False, True):
            inputs = _Inputs(dtype, device, seed=2)
            inputs.make("x", ids.numel() if grouped_in else TOKENS, HIDDEN)
            inputs.make("weight", EXPERTS, INTERMEDIATE, HIDDEN, scale=HIDDEN**-0.5)
            inputs.make("bias", EXPERTS, INTERMEDIATE)
            t, x = inputs.tested, inputs.exact
            rows = [torch.zeros(INTERMEDIATE, dtype=torch.float64)] * ids.numel()
            for token, slot, expert in _slots(ids):
                row = x["x"][order.index(slot) if grouped_in else token]
                rows[order.index(slot) if grouped_out else slot] = x["weight"][expert] @ row + x["bias"][expert]
            actual = functional.parallel_linear(t["x"], t["weight"], routing, t["bias"], grouped_in, grouped_out)
            yield from inputs.compare(actual, torch.stack(rows), HIDDEN, {"y": 1})


def _check_combine(dtype: torch.dtype, device: torch.device) -> Iterator[_Expected]:
    ids = _expert_ids()
    routing = functional.route(ids.to(device), EXPERTS)
    order = _grouped_order(ids)
    for grouped in (False, True):
        inputs = _Inputs(dtype, device, seed=3)
        inputs.make("rows", ids.numel(), HIDDEN)
        inputs.make("gates", TOKENS, TOP_K)
        t, x = inputs.tested, inputs.exact
        rows = [torch.zeros(HIDDEN, dtype=torch.float64)] * TOKENS
        for token, slot, _ in _slots(ids):
            row = x["rows"][order.index(slot) if grouped else slot]
            rows[token] = rows[token] + x["gates"][token, slot % TOP_K] * row
        actual = functional.combine(t["rows"], t["gates"], routing, grouped)
        yield from inputs.compare(actual, torch.stack(rows), HIDDEN, {"y": 1})


def _activate(z: Tensor, activation: str, glu_layout: str) -> Tensor:
    """The activation of one slot; `glu_layout` is empty for a plain one."""
    known = ACTIVATIONS | KINKED_ACTIVATIONS
    if not glu_layout:
        return known[activation](z)
    gate, up = (z[0::2], z[1::2]) if glu_layout == "interleaved" else z.chunk(2)
    if glu_layout == "up_gate":
        gate, up = up, gate
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return known[activation](gate) * up


def _check_mlp(dtype: torch.dtype, device: torch.device) -> Iterator[_Expected]:
    ids = _expert_ids()
    routing = functional.route(ids.to(device), EXPERTS)
    names = list(ACTIVATIONS) + (list(KINKED_ACTIVATIONS) if dtype in (torch.float64, torch.float32) else [])
    cases = [(name, "gate_up" if "glu" in name else "", False) for name in names]
    cases += [("swiglu", "up_gate", False), ("swiglu", "interleaved", False), ("swiglu", "gate_up", True)]
    for activation, glu_layout, recompute in cases:
        inputs = _Inputs(dtype, device, seed=4)
        width = INTERMEDIATE * (2 if glu_layout else 1)
        inputs.make("x", TOKENS, HIDDEN)
        inputs.make("w_up", EXPERTS, width, HIDDEN, scale=HIDDEN**-0.5)
        inputs.make("up_bias", EXPERTS, width)
        inputs.make("w_down", EXPERTS, HIDDEN, INTERMEDIATE, scale=INTERMEDIATE**-0.5)
        inputs.make("down_bias", EXPERTS, HIDDEN)
        inputs.make("gates", TOKENS, TOP_K, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        t, x = inputs.tested, inputs.exact
        rows = [torch.zeros(HIDDEN, dtype=torch.float64)] * TOKENS
        for token, slot, e in _slots(ids):
            z = x["w_up"][e] @ x["x"][token] + x["up_bias"][e]
            y = x["w_down"][e] @ _activate(z, activation, glu_layout) + x["down_bias"][e]
            rows[token] = rows[token] + x["gates"][token, slot % TOP_K] * y
        options = {"up_bias": t["up_bias"], "down_bias": t["down_bias"], "recompute": recompute}
        options["activation"] = activation
        if glu_layout:
            options["glu_layout"] = glu_layout
        actual = functional.moe_mlp(t["x"], t["w_up"], t["w_down"], t["gates"], routing, **options)
        # Up to three matrix products follow one another, each with errors of its own.
        for expected in inputs.compare(actual, torch.stack(rows), 4 * HIDDEN, {"y": 5}):
            # The gates are not rounded to the dtype, but what their gradient is made of is.
            yield expected._replace(
                actual=expected.actual.to(dtype) if expected.name == "grad gates" else expected.actual
            )


def _check_gating(dtype: torch.dtype, device: torch.device) -> Iterator[_Expected]:
    for scoring, normalize in (("softmax", False), ("softmax", True), ("sigmoid", True)):
        inputs = _Inputs(dtype, device, seed=5)
        inputs.make("logits", TOKENS, EXPERTS, scale=2.0)
        logits = inputs.exact["logits"]
        score = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
        reference, reference_ids = score.topk(TOP_K, dim=-1)
        if normalize:
            reference = reference / reference.sum(-1, keepdim=True)
        actual, ids = functional.topk_gating(inputs.tested["logits"], TOP_K, scoring=scoring, normalize=normalize)
        yield _Expected("expert_ids", ids.flatten()[:, None], reference_ids.double().flatten()[:, None], 0, 0)
        # The gates are float32 or float64 whatever the logits are.
        yield from inputs.compare(actual, reference, EXPERTS, {"y": 2})


CHECKS: dict[str, Callable[[torch.dtype, torch.device], Iterator[_Expected]]] = {
    "group_by_expert": _check_grouping,
    "parallel_linear": _check_linear,
    "combine": _check_combine,
    "moe_mlp": _check_mlp,
    "topk_gating": _check_gating,
}


def run(device: torch.device | str = "cpu", dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Result]:
    """Runs every operator, forward and backward, and compares each result with the float64 reference.

    Args:
        device: where the operators run.
        dtypes: floating dtypes of the inputs.

    Returns:
        An iterator over one :class:`Result` for each operator, tensor and dtype, the worst of the operator's variants.

    Raises:
        RuntimeError: The device does not exist; an operator that fails is a Result with a `problem`.

    Example:
        >>> from scattermoe import selfcheck
        >>> all(result.passed for result in selfcheck.run("cpu"))
        True
    """
    device = torch.device(device)
    for op, check in CHECKS.items():
        for dtype in dtypes:
            worst: dict[str, Result] = {}
            try:
                for name, actual, reference, length, roundings in check(dtype, device):
                    limit = _bound(actual.dtype, length, roundings) if actual.is_floating_point() else 0.0
                    result = Result(op, name, dtype, row_error(actual, reference), limit)
                    known = worst.get(name)
                    if known is None or not result.error * known.bound <= known.error * result.bound:
                        worst[name] = result
            except Exception as error:  # any failure of an op is what this is here to report
                worst["y"] = Result(
                    op, "y", dtype, math.nan, math.nan, f"{type(error).__name__}: {error}".splitlines()[0]
                )
            yield from worst.values()
