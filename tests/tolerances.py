"""How far a result may be from the float64 reference, derived once for the whole suite.

Measure. A tensor's error is the largest over its rows (vectors along the last dimension) of

    ||row - ref|| / max(||ref||, f r)

where r is the root mean square of the norms of the reference's nonzero rows and f, between 1 and 1/4, is 1 / sqrt(width).
The floor is for short rows: one number that cancelled to nearly nothing has no small relative error in any arithmetic, and
its neighbours say what it is made of; the norm of a row of many numbers cannot be that far from typical by chance. A row
that is exactly zero in the reference (a sentinel's, an empty expert's) must be exactly zero.

Where a row misses the bound all the same, the reference says how much the row depends on its inputs: the largest change over
a few random relative changes of every input element, divided by their size, takes the place of ||ref|| if it is larger. A
row that is one number (one expert, one output feature, the same token repeated) can cancel without any neighbour to tell.

Bound. Let u be the unit roundoff of a dtype (half its eps). A sum of L random terms of size a, added one by one in a format
of roundoff v, has partial sums of size a sqrt(i), each rounded: errors add up to about v a sqrt(sum i) = v a L / sqrt(2),
which is v sqrt(L / 2) of the sum's own size a sqrt(L). Every rounding to the tensor's dtype on the way (a stored
intermediate result, the output) adds at most u. With n such roundings

    bound = 4 (v sqrt(L) + n u)

where v is the roundoff of the accumulator: float32 for bfloat16 and float16, else the dtype's own. The factor 4 covers the
floor above and the step from a typical row to the worst of thousands. For bfloat16 the second term rules, so an
accumulation in bfloat16 over L = 64 terms (n = 8 in effect) already stands out.

Below a dtype's smallest normal number roundoff is absolute: half of the spacing tiny * eps there. That much is taken off
every element's difference. Only float16 notices (3e-8).
"""

import math

import torch
from torch import Tensor

SAFETY = 4.0
FLOOR = 0.25

# Roundings to the tensor's dtype between the inputs and each result, when every intermediate result that the design keeps
# or may keep in memory is stored in that dtype.
#   parallel_linear: the result itself; a gradient likewise. In a scattered layout with K > 1, grad x sums K stored rows.
#   combine: the result itself.
#   moe_mlp forward: z, A (z counts twice: a product of two rounded halves), the rows of the down-projection, y.
#   moe_mlp backward: grad y is exact; dA', z (twice), dz or g*A, and the gradient; grad x has one more for the rows summed.
#   lora: as moe_mlp, and on either side of the activation the rows of rank r, their product and the sum that it goes into.
ROUNDINGS = {
    "parallel_linear": {"y": 1, "x": 2, "weight": 1, "bias": 1},
    "combine": {"y": 1, "rows": 1, "gates": 1},
    "moe_mlp": {"y": 5, "z": 1, "x": 6, "w_up": 5, "b_up": 5, "w_down": 5, "b_down": 2, "gates": 5},
    "lora_linear": {"y": 3, "x": 4, "weight": 1, "bias": 1, "a": 3, "b": 3},
    "lora": {
        **{"y": 9, "x": 10, "w_up": 9, "b_up": 9, "w_down": 9, "b_down": 2, "gates": 9},
        **{"up_a": 10, "up_b": 10, "down_a": 10, "down_b": 10},
    },
    "topk_gating": {"gates": 2, "logits": 2},
}


def roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest in `dtype`."""
    return torch.finfo(dtype).eps / 2


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over `dtype` are formed."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def bound(dtype: torch.dtype, length: int, roundings: int) -> float:
    """Largest allowed error of a result in `dtype` with sums of `length` terms and `roundings` stored results on the way."""
    return SAFETY * (roundoff(accumulator(dtype)) * math.sqrt(max(length, 1)) + roundings * roundoff(dtype))


def rms_norm(rows: Tensor) -> float:
    """Root mean square of the norms of the nonzero rows of a matrix."""
    norms = rows.norm(dim=1)
    nonzero = norms[norms > 0]
    return float(nonzero.square().mean().sqrt()) if nonzero.numel() else 0.0


def row_error(actual: Tensor, reference: Tensor, scale: Tensor | None = None, exact_zeros: bool = True) -> float:
    """The measure above; infinite where one has NaN or infinity and the other has not, or misses an exact zero row.

    `scale`, shaped like `reference`, is the size that results of this kind have before anything cancels.
    """
    info = torch.finfo(actual.dtype)
    underflow = info.tiny * info.eps / 2
    actual = actual.detach().to("cpu", torch.float64)
    assert actual.shape == reference.shape, f"shape {tuple(actual.shape)}, reference {tuple(reference.shape)}"
    if reference.numel() == 0:
        return 0.0
    width = reference.size(-1) if reference.dim() else 1
    actual, reference = actual.reshape(-1, width), reference.detach().reshape(-1, width)
    finite = reference.isfinite()
    same = (actual.isnan() == reference.isnan()) & (finite | reference.isnan() | (actual == reference))
    if not bool((same & (actual.isfinite() == finite)).all()):
        return math.inf
    actual, reference = actual.where(finite, 0.0), reference.where(finite, 0.0)
    norms = reference.norm(dim=1)
    error = ((actual - reference).abs() - underflow).clamp_min(0.0).norm(dim=1)
    if exact_zeros and bool((actual[norms == 0] != 0).any()):
        return math.inf
    size = norms.clamp_min(max(width**-0.5, FLOOR) * rms_norm(reference))
    if scale is not None:
        size = torch.maximum(size, scale.reshape(-1, width).norm(dim=1))
    return float((error / size).where(error > 0, 0.0).max())


def assert_close(
    name: str,
    actual: Tensor,
    reference: Tensor,
    length: int,
    roundings: int,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
) -> None:
    """Fails with the measured error and the bound when `actual` is too far from `reference`.

    `dtype` is the coarsest dtype on the way when it is not that of `actual`; `scale` as in `row_error`.
    """
    dtype = actual.dtype if dtype is None else dtype
    limit = bound(dtype, length, roundings)
    error = row_error(actual, reference, scale)
    assert error <= limit, f"{name}: per-row relative error {error:.3g} is above {limit:.3g} ({dtype}, length {length})"


# Whole models: the norm of a tensor's error over the norm of the tensor, since a model mixes everything with everything.


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """||actual - reference|| / ||reference||; infinite where only one of them is zero or finite."""
    actual, reference = (tensor.detach().to("cpu", torch.float64) for tensor in (actual, reference))
    assert actual.shape == reference.shape, f"shape {tuple(actual.shape)}, reference {tuple(reference.shape)}"
    error, size = float((actual - reference).norm()), float(reference.norm())
    if error == 0.0:
        return 0.0
    return error / size if size > 0.0 and math.isfinite(error) else math.inf


def model_bound(width: int, layers: int) -> float:
    """How far two float32 runs of one model may be apart: sums over `width` terms, ten stored results a layer."""
    return bound(torch.float32, width, 10 * layers)


def low_precision_bound(dtype: torch.dtype, peer: float) -> float:
    """How far a model in `dtype` may be from the same weights in float32, where other right code in `dtype` is `peer` away.

    Roundings of different luck are within a factor of two of each other; one stored result more covers tensors of few numbers.
    """
    return 2.0 * peer + bound(dtype, 1, 1)
