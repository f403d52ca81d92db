"""SonicMoE (github.com/Dao-AILab/sonic-moe): its two projections with a routing that is given.

Its QuACK kernels are compiled and tuned at the first call of each shape. The full search takes more than nine minutes on 16
cores; SONICMOE_FULL_SEARCH=1 asks for it. Without, it is cut down to the tiles of 128 or 256 rows by 128 to 256 columns
among which it finds its best on Hopper, and its sums, of which it tries all variants, are timed as briefly as its products.
"""

import os
from importlib.metadata import version
from typing import Any

import quack.gemm_interface
import torch
from problem import Problem
from sonicmoe.enums import ActivationType
from sonicmoe.functional import TC_topk_router_metadata_triton, _DownProjection, _UpProjection
from sonicmoe.functional.reduction_over_k_gather import token_gather_sum_kernel
from torch import Tensor

from peers.tuning import cut_search

# (rows, columns, ping-pong)
TILES = {(128, 256, False), (256, 128, False), (256, 192, False), (128, 128, True), (128, 160, True), (128, 192, True)}


def keep(config: Any) -> bool:
    """Whether a variant of a product is among TILES."""
    c = config.kwargs["config"]
    wanted = (c.tile_m, c.tile_n, c.pingpong) in TILES
    return wanted and c.device_capacity == 9 and c.cluster_n == 1 and not c.swap_ab


if os.environ.get("SONICMOE_FULL_SEARCH") != "1":
    for name in ("gemm_tuned", "gemm_gated_tuned", "gemm_dgated_tuned"):
        cut_search(getattr(quack.gemm_interface, name), keep)
    cut_search(token_gather_sum_kernel)


class Layer:
    """See :mod:`peers`."""

    def __init__(self, problem: Problem) -> None:
        self.problem, shape = problem, problem.shape
        experts, width, hidden = shape.num_experts, shape.intermediate_size, shape.hidden_size
        # Its gate and up rows alternate.
        rows = problem.w_up.view(experts, 2, width, hidden).transpose(1, 2).reshape(experts, 2 * width, hidden)
        self.w_up, self.w_down = rows.requires_grad_(), problem.w_down.detach().requires_grad_()
        self.x, self.gates = problem.x.detach().requires_grad_(), problem.gates.detach().requires_grad_()
        self.expert_ids = problem.expert_ids.int()
        self.leaves = [self.x, self.gates, self.w_up, self.w_down]

    def forward(self) -> Tensor:
        """One call of the layer."""
        shape = self.problem.shape
        slots, tokens, top_k = shape.slots, shape.tokens, shape.top_k
        integers = {"dtype": torch.int32, "device": self.x.device}
        gather, scatter, reverse = (torch.empty(slots, **integers) for _ in range(3))
        counts, offsets = (torch.empty(shape.num_experts + extra, **integers) for extra in (0, 1))
        TC_topk_router_metadata_triton(self.expert_ids, shape.num_experts, counts, offsets, gather, scatter, reverse)
        inference = not torch.is_grad_enabled()
        swiglu = ActivationType.SWIGLU
        w_up, w_down = (weight.permute(1, 2, 0) for weight in (self.w_up, self.w_down))
        hidden, z = _UpProjection.apply(
            self.x, w_up, None, offsets, slots, top_k, gather, scatter, reverse, None, False, swiglu, inference, False
        )
        return _DownProjection.apply(
            hidden, z, w_down, None, self.gates, offsets, tokens, top_k, gather, scatter, reverse, None, False, swiglu
        )

    def weight_gradient(self, expert: int) -> tuple[Tensor, Tensor]:
        """Gradients of one expert."""
        up = self.w_up.grad[expert]
        return torch.cat([up[0::2], up[1::2]]), self.w_down.grad[expert]

    @staticmethod
    def version() -> str:
        """Version of the package."""
        return version("sonic-moe")
