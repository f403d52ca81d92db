"""Cases: what goes into an operator, described by a few printable values, and the tensors made from them."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from tests import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
EXPERT_COUNTS = (1, 3, 60, 96, 129, 512, 1025)
ROUTINGS = (
    "uniform",
    "skewed",
    "one_expert",
    "few_experts",
    "last_expert",
    "repeated",
    "sentinels",
    "mostly_sentinels",
    "all_sentinels",
    "tile_ends",
)
ID_DTYPES = (torch.int64, torch.int32, torch.int16)
LAYOUTS = ("contiguous", "padded_rows", "strided", "transposed", "offset", "expanded")
WEIGHT_LAYOUTS = ("contiguous", "transposed", "sliced", "offset")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_ids(
    tokens: int, top_k: int, experts: int, routing: str, seed: int, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Expert ids [tokens, top_k] of one of the ROUTINGS."""
    g = generator(seed)
    shape = (tokens, top_k)
    uniform = torch.randint(experts, shape, generator=g)
    if routing == "uniform":
        # Distinct experts in a token, as a router gives them, as long as there are enough.
        if top_k <= experts and tokens:
            uniform = torch.rand(tokens, experts, generator=g).topk(top_k, dim=1).indices
        ids = uniform
    elif routing == "skewed":
        ids = (torch.rand(shape, generator=g).pow(4) * experts).long().clamp_max(experts - 1)
    elif routing == "one_expert":
        ids = torch.full(shape, int(torch.randint(experts, (), generator=g)))
    elif routing == "few_experts":
        ids = uniform % max(1, min(3, experts - 1))
    elif routing == "last_expert":
        ids = torch.full(shape, experts - 1)
    elif routing == "repeated":
        ids = uniform[:, :1].expand(shape)
    elif routing == "sentinels":
        outside = torch.tensor([-1, -2, -100, experts, experts + 1, experts + 100])
        ids = torch.where(
            torch.rand(shape, generator=g) < 0.3, outside[torch.randint(len(outside), shape, generator=g)], uniform
        )
    elif routing == "mostly_sentinels":
        ids = torch.where(torch.rand(shape, generator=g) < 0.9, torch.tensor(-1), uniform)
    elif routing == "all_sentinels":
        ids = torch.where(torch.rand(shape, generator=g) < 0.5, torch.tensor(-1), torch.tensor(experts))
    elif routing == "tile_ends":
        # As many slots for an expert as end a tile, or a part of one, or just do not; what is left has none.
        counts = torch.tensor([1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 0, 255, 256, 257]).repeat(experts)[:experts]
        ids = torch.full((tokens * top_k,), -1)
        of_experts = torch.arange(experts).repeat_interleave(counts)[: ids.numel()]
        ids[: of_experts.numel()] = of_experts
        ids = ids[torch.randperm(ids.numel(), generator=g)].view(shape)
    else:
        raise ValueError(f"unknown routing {routing}")
    return ids.to(dtype).contiguous()


def arrange(values: Tensor, layout: str) -> Tensor:
    """`values` in another memory layout. Memory between and around the elements is NaN, so that reading it shows."""
    nan = float("nan")
    if layout == "contiguous":
        return values.contiguous()
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "padded_rows":
        buffer = values.new_full((*values.shape[:-1], values.shape[-1] + 3), nan)
        view = buffer[..., 1:-2]
    elif layout == "strided":
        view = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), nan)[..., ::2]
    elif layout == "sliced":
        view = values.new_full((values.shape[0], values.shape[1] + 2, *values.shape[2:]), nan)[:, 1:-1]
    elif layout == "offset":
        # One element off: not aligned to anything wider than the element.
        view = values.new_full((values.numel() + 1,), nan)[1:].view(values.shape)
    else:
        raise ValueError(f"unknown layout {layout}")
    return view.copy_(values)


def make(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0, layout: str = "contiguous"
) -> Tensor:
    """Normal random values on the CPU; layout "expanded" repeats one row without storing it again."""
    if layout == "expanded":
        one = torch.randn(*shape[:-2], 1, shape[-1], generator=generator(seed), dtype=torch.float64) * scale
        return one.to(dtype).expand(shape)
    values = torch.randn(shape, generator=generator(seed), dtype=torch.float64) * scale
    return arrange(values.to(dtype), layout)


def to_device(tensor: Tensor, device: str) -> Tensor:
    """`tensor` on `device` with the same strides and storage offset."""
    if torch.device(device).type == "cpu":
        return tensor
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.as_strided((size,), (1,), 0).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def seed_of(case: Any) -> int:
    """A seed that depends on everything in the case but its device, the same in every process."""
    return random.Random(repr(dataclasses.replace(case, device="cpu"))).getrandbits(31)


class Shown:
    """Prints a case as the call that makes it, without the fields that have their defaults."""

    def __repr__(self) -> str:
        fields = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Linear(Shown):
    """One call of parallel_linear and its gradients."""

    tokens: int = 13
    top_k: int = 2
    experts: int = 5
    n_in: int = 24
    n_out: int = 20
    routing: str = "uniform"
    rows: str = "token"
    grouped_out: bool = False
    bias: bool = True
    dtype: torch.dtype = torch.float64
    id_dtype: torch.dtype = torch.int64
    flat_ids: bool = False
    x_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    grads: tuple[str, ...] = ("x", "weight", "bias")
    device: str = "cpu"


@dataclasses.dataclass(frozen=True, repr=False)
class Combine(Shown):
    """One call of combine and its gradients."""

    tokens: int = 13
    top_k: int = 3
    experts: int = 5
    width: int = 20
    routing: str = "uniform"
    grouped: bool = True
    dtype: torch.dtype = torch.float64
    gates: torch.dtype | None = torch.float64
    rows_layout: str = "contiguous"
    gates_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    grads: tuple[str, ...] = ("rows", "gates")
    device: str = "cpu"


@dataclasses.dataclass(frozen=True, repr=False)
class Mlp(Shown):
    """One call of moe_mlp and its gradients."""

    tokens: int = 11
    top_k: int = 2
    experts: int = 5
    hidden: int = 24
    width: int = 16
    n_out: int | None = None
    activation: str = "swiglu"
    glu_layout: str = "gate_up"
    routing: str = "uniform"
    biases: tuple[str, ...] = ("b_up", "b_down")
    dtype: torch.dtype = torch.float64
    gates: torch.dtype | None = None  # the dtype of the gates; None is that of x
    limit: float = 1.0
    x_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    gates_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    grads: tuple[str, ...] = ("x", "w_up", "b_up", "w_down", "b_down", "gates")
    recompute: bool = False
    device: str = "cpu"

    @property
    def up_rows(self) -> int:
        return self.width * (2 if self.activation in reference.GATED else 1)


@dataclasses.dataclass(frozen=True, repr=False)
class Gating(Shown):
    """One call of topk_gating and its gradient."""

    tokens: int = 11
    experts: int = 12
    k: int = 3
    scoring: str = "softmax"
    normalize: bool = False
    selection_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    device: str = "cpu"


Case = Linear | Combine | Mlp | Gating


def mlp_tensors(case: Mlp, seed: int) -> dict[str, Tensor | None]:
    """The tensors of `case` on the CPU.

    With a kinked activation the pre-activations are odd multiples of 1/8 below 32, which every dtype holds exactly and which
    never touch a kink (0 or a limit that is a multiple of 1/4): no rounding may decide which side a value is on.
    """
    exact = case.activation in reference.KINKED
    e, h, u, i = case.experts, case.hidden, case.up_rows, case.width
    if exact:
        g = generator(seed)
        x = torch.randint(-1, 2, (case.tokens, h), generator=g).double()
        w_up = torch.randint(-1, 2, (e, u, h), generator=g).double() / 4
        w_up[:, :, 8:] *= torch.randint(0, 2, (e, u, max(h - 8, 0)), generator=g)
        if h:
            x[:, 0] = 1
            w_up[:, :, 0] = (2 * torch.randint(-2, 2, (e, u), generator=g) + 1).double() / 8
        x = x.to(case.dtype)
        x = x[:1].expand(x.shape) if case.x_layout == "expanded" else arrange(x, case.x_layout)
        w_up = arrange(w_up.to(case.dtype), case.weight_layout)
        b_up = torch.randint(-4, 5, (e, u), generator=g).double().div(4).to(case.dtype)
    else:
        x = make((case.tokens, h), case.dtype, seed + 1, 1.0, case.x_layout)
        w_up = make((e, u, h), case.dtype, seed + 2, max(h, 1) ** -0.5, case.weight_layout)
        b_up = make((e, u), case.dtype, seed + 3, 0.5)
    n_out = h if case.n_out is None else case.n_out
    gates = torch.rand(case.tokens, case.top_k, generator=generator(seed + 6), dtype=torch.float64) + 0.1
    return {
        "x": x,
        "w_up": w_up,
        "b_up": b_up if "b_up" in case.biases else None,
        "w_down": make((e, n_out, i), case.dtype, seed + 4, max(i, 1) ** -0.5, case.weight_layout),
        "b_down": make((e, n_out), case.dtype, seed + 5, 0.5) if "b_down" in case.biases else None,
        "gates": arrange(gates.to(case.gates or case.dtype), case.gates_layout),
    }
