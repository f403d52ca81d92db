"""ScatterMoE's Triton kernels (github.com/shawntan/scattermoe), whose package has this library's name.

It is found because --peer-path comes first in the process of a peer; nothing is renamed.
"""

import torch
from problem import Problem
from torch import Tensor

import scattermoe
from scattermoe.mlp import GLUMLP

if hasattr(scattermoe, "moe_mlp"):
    raise ImportError("ScatterMoE's Triton package is not in --peer-path")


class Layer:
    """See :mod:`peers`."""

    def __init__(self, problem: Problem) -> None:
        self.problem, shape = problem, problem.shape
        torch._dynamo.reset()  # its sort is compiled: anew for each shape rather than for any shape
        with torch.device("meta"):
            self.mlp = GLUMLP(shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
        # Its first half of the up-projection's rows is the linear one and its second half the gate.
        self.w_up = torch.nn.Parameter(problem.w_up.roll(shape.intermediate_size, dims=1))
        self.w_down = torch.nn.Parameter(problem.w_down)
        self.mlp.experts.weight, self.mlp.output_experts.weight = self.w_up, self.w_down
        self.x, self.gates = (value.detach().requires_grad_() for value in (problem.x, problem.gates.to(problem.dtype)))
        self.leaves = [self.x, self.gates, self.w_up, self.w_down]

    def forward(self) -> Tensor:
        """One call of the layer."""
        return self.mlp(self.x, self.gates, self.problem.expert_ids)

    def weight_gradient(self, expert: int) -> tuple[Tensor, Tensor]:
        """Gradients of one expert."""
        return self.w_up.grad[expert].roll(self.problem.shape.intermediate_size, dims=0), self.w_down.grad[expert]

    @staticmethod
    def version() -> str:
        """The package does not say."""
        return getattr(scattermoe, "__version__", "0.3")
