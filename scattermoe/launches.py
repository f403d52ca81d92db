"""Which kernels an operator launches for sizes, dtype and device, and why: asked without running it, and without a GPU."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from . import _library
from .kernels import ops as _switches

__all__ = ["Launch", "explain"]


class Launch(NamedTuple):
    """One kernel of an operator; printed as a line.

    Attributes:
        step: what it computes.
        kernel: the name that a profiler shows, less template arguments; on the CPU what stands in its place.
        tile: rows and columns of the output that one thread block computes at a time, and the part of the contraction that one
            stage of its pipeline holds; None for a kernel that multiplies no matrices.
        stages: how many of these are on their way from memory.
        why: the reason for this kernel and this tile.
    """

    step: str
    kernel: str
    tile: tuple[int, int, int] | None
    stages: int | None
    why: str

    def __str__(self) -> str:
        tile = "" if self.tile is None else f" {'x'.join(map(str, self.tile))}, {self.stages} stages"
        return f"{self.step}: {self.kernel}{tile}; {self.why}"


def code_arch(archs: list[str], capability: int) -> int | None:
    """Returns the architecture of the compiled code that the driver loads for a GPU, as it chooses: the newest binary of the
    same generation that is not newer than the GPU, else the newest PTX, else None."""
    binaries = [int(a[3:]) for a in archs if a.startswith("sm_") and a[3:].isdigit()]
    ptx = [int(a[8:]) for a in archs if a.startswith("compute_")]
    same_generation = [a for a in binaries if a // 10 == capability // 10 and a <= capability]
    older = [a for a in ptx if a <= capability]
    return max(same_generation or older, default=None)


def _resolve(device: torch.device | str | None) -> tuple[int | None, bool]:
    """Returns the architecture of the code for a device (None for the CPU), and whether Hopper's own kernels are in use."""
    info = _library.load().build_info()
    if device is None:
        device = "cuda" if info["cuda"] and torch.cuda.is_available() else "cpu"
    if isinstance(device, str) and device.startswith("sm_"):
        if not device[3:].isdigit():
            raise ValueError(f"explain: expected device to be sm_ and an architecture, such as sm_90, got {device!r}")
        return int(device[3:]), True
    device = torch.device(device)
    if device.type == "cpu":
        return None, False
    if device.type != "cuda":
        raise ValueError(f"explain: expected device to be cpu, cuda or such as sm_90, got {str(device)!r}")
    if not info["cuda"]:
        raise ValueError("explain: this build is for the CPU only; name an architecture, such as device='sm_90'")
    major, minor = torch.cuda.get_device_capability(device)
    arch = code_arch(info["cuda_archs"], 10 * major + minor)
    if arch is None:
        raise ValueError(
            f"explain: this build has no code for {device} ({major}.{minor}); build it with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    wanted = os.environ.get("SCATTERMOE_PORTABLE_KERNELS", "0") in ("", "0")
    return arch, wanted and "sm_90a" in info["cuda_archs"]


def explain(
    op: str,
    *,
    num_tokens: int,
    num_experts: int,
    top_k: int = 1,
    hidden_size: int = 0,
    intermediate_size: int = 0,
    dtype: torch.dtype | str = torch.bfloat16,
    device: torch.device | str | None = None,
    backward: bool = False,
    activation: str = "swiglu",
    glu_layout: str = "gate_up",
    bias: bool = False,
    transposed: bool = False,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> list[Launch]:
    """List the kernels that an operator launches, in their order, with their tiles and the reason for them.

    The choice is a function of sizes, dtype and architecture alone (nothing is tuned at run time), so that it can be asked
    without a GPU. It is that for contiguous tensors in memory of their own.

    Args:
        op: ``group_by_expert`` (which :func:`scattermoe.route` calls), ``parallel_linear``, ``combine``, ``moe_mlp`` or
            ``topk_gating``.
        num_tokens: ``T``.
        num_experts: ``E``.
        top_k: ``K``.
        hidden_size: ``H``, the columns of ``x``, or of the rows that ``combine`` reads.
        intermediate_size: ``I``, the columns of ``act(z)``; for ``parallel_linear`` the columns of its output.
        dtype: float64, float32, bfloat16 or float16, or its name.
        device: where: ``cpu``, ``cuda`` or, without needing one, an architecture such as ``sm_80`` or ``sm_90``. None: the GPU if
            there is one, else the CPU.
        backward: the kernels of its backward instead, with every gradient asked for.
        activation: of ``moe_mlp``.
        glu_layout: of ``moe_mlp``.
        bias: whether there are biases.
        transposed: whether the weights are transposed views of ``[E, in, out]``.
        grouped_in: of ``parallel_linear``.
        grouped_out: of ``parallel_linear``.

    Returns:
        A :class:`Launch` for each kernel; an empty list where there is nothing to compute.

    Raises:
        ValueError: An unknown name, an impossible size, the backward of ``group_by_expert``, or a device that this build has no
            code for.

    Example:
        >>> import scattermoe
        >>> sizes = {"num_tokens": 8192, "num_experts": 8, "top_k": 2, "hidden_size": 4096, "intermediate_size": 14336}
        >>> [launch.kernel for launch in scattermoe.explain("moe_mlp", device="sm_90", **sizes)]
        ['sm90::grouped_gemm_kernel', 'sm90::grouped_gemm_kernel', 'combine_kernel']
    """
    arch, hopper = _resolve(device)
    allow_tf32 = _switches.ALLOW_TF32
    launches = _library.load().explain(
        op,
        dtype=str(dtype).removeprefix("torch."),
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        backward=backward,
        arch=arch,
        hopper=hopper,
        allow_tf32=torch.backends.cuda.matmul.allow_tf32 if allow_tf32 is None else allow_tf32,
        bias=bias,
        transposed=transposed,
        grouped_in=grouped_in,
        grouped_out=grouped_out,
        activation=activation,
        glu_layout=glu_layout,
    )
    return [Launch(**launch) for launch in launches]
