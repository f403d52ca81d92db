"""This library: ``scattermoe.route`` and ``scattermoe.moe_mlp``."""

from problem import Problem
from torch import Tensor

import scattermoe


class Layer:
    """See :mod:`peers`."""

    def __init__(self, problem: Problem, recompute: bool = False) -> None:
        self.problem, self.recompute = problem, recompute
        self.x, self.gates = (value.detach().requires_grad_() for value in (problem.x, problem.gates))
        self.w_up, self.w_down = (value.detach().requires_grad_() for value in (problem.w_up, problem.w_down))
        self.leaves = [self.x, self.gates, self.w_up, self.w_down]

    def forward(self) -> Tensor:
        """One call of the layer."""
        routing = scattermoe.route(self.problem.expert_ids, self.problem.shape.num_experts)
        return scattermoe.moe_mlp(self.x, self.w_up, self.w_down, self.gates, routing, recompute=self.recompute)

    def weight_gradient(self, expert: int) -> tuple[Tensor, Tensor]:
        """Gradients of one expert."""
        return self.w_up.grad[expert], self.w_down.grad[expert]

    @staticmethod
    def version() -> str:
        """Version of the library."""
        return scattermoe.__version__
