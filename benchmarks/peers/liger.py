"""Liger-Kernel (github.com/linkedin/Liger-Kernel): its fused MoE function, Triton kernels tuned at the first call of a shape."""

from importlib.metadata import version

from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
from problem import Problem
from torch import Tensor


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
