"""Liger-Kernel (github.com/linkedin/Liger-Kernel): its fused MoE function.

Its Triton kernels are compiled and tuned at the first call of each shape: 240 variants, some minutes. LIGER_FULL_SEARCH=1 asks for
that. Without, it has its largest tiles to choose from, with 3 or 4 stages and 4 or 8 warps.
"""

import os
from importlib.metadata import version
from typing import Any

from liger_kernel.ops import fused_moe
from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
from problem import Problem
from torch import Tensor

from peers.tuning import cut_search

PRODUCTS = ("_fused_up_proj_swiglu", "_fused_down_proj", "_moe_bwd_down_proj", "_moe_bwd_dX_expanded")
WEIGHT_GRADIENTS = ("_moe_bwd_dW1", "_moe_bwd_dW2")


def keep_product(config: Any) -> bool:
    """Tiles of 64 by 128, 64 deep."""
    return config.kwargs == {"BLOCK_N": 128, "BLOCK_K": 64} and config.num_stages in (3, 4)


def keep_weight_gradient(config: Any) -> bool:
    """Tiles of 128 by 128, 32 deep."""
    return config.kwargs == {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}


def keep_sum(config: Any) -> bool:
    """All columns at once, or nearly; all of a token's rows, or half of eight."""
    return config.kwargs["BLOCK_H"] == 512 and config.kwargs["BLOCK_K"] in (2, 4, 8, 16)


if os.environ.get("LIGER_FULL_SEARCH") != "1":
    for kernels, keep in ((PRODUCTS, keep_product), (WEIGHT_GRADIENTS, keep_weight_gradient)):
        for name in kernels:
            cut_search(getattr(fused_moe, f"{name}_kernel"), keep)
    cut_search(fused_moe._token_gather_weighted_sum_kernel, keep_sum)


class Layer:
    """See :mod:`peers`."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.x, self.gates = (value.detach().requires_grad_() for value in (problem.x, problem.gates))
        self.w_up, self.w_down = (value.detach().requires_grad_() for value in (problem.w_up, problem.w_down))
        self.expert_ids = problem.expert_ids.int()
        self.leaves = [self.x, self.gates, self.w_up, self.w_down]

    def forward(self) -> Tensor:
        """One call of the layer."""
        return LigerFusedMoEFunction.apply(self.x, self.w_up, self.w_down, self.expert_ids, self.gates)

    def weight_gradient(self, expert: int) -> tuple[Tensor, Tensor]:
        """Gradients of one expert."""
        return self.w_up.grad[expert], self.w_down.grad[expert]

    @staticmethod
    def version() -> str:
        """Version of the package."""
        return version("liger-kernel")
