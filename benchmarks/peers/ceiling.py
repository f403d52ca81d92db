"""The products of the layer as six plain batched ones (cuBLAS) over equal, already grouped rows: what there is to reach.

No routing, gather, activation, gate or sum: nothing but the matrix products, whatever the routing of the problem. Its
operands are random too, for a GPU at its power limit multiplies zeros faster.
"""

from collections.abc import Callable

import torch
from problem import Problem
from torch import Tensor


class Layer:
    """See :mod:`peers`; it has a backward of its own and no result to check."""

    def __init__(self, problem: Problem) -> None:
        shape = problem.shape
        self.rows = max(1, round(shape.slots / shape.num_experts))
        generator = torch.Generator(problem.device).manual_seed(2)

        def random(columns: int) -> Tensor:
            size = (shape.num_experts, self.rows, columns)
            return torch.empty(size, dtype=problem.dtype, device=problem.device).normal_(generator=generator)

        self.w_up, self.w_down = problem.w_up, problem.w_down
        self.x, self.grad = random(shape.hidden_size), random(shape.hidden_size)
        self.hidden, self.grad_z = random(shape.intermediate_size), random(2 * shape.intermediate_size)
        self.leaves: list[Tensor] = []

    def products(self) -> dict[str, Callable[[], Tensor]]:
        """Each product by its name, in the order of the layer."""
        return {
            "up": lambda: torch.bmm(self.x, self.w_up.transpose(1, 2)),
            "down": lambda: torch.bmm(self.hidden, self.w_down.transpose(1, 2)),
            "dO W_down": lambda: torch.bmm(self.grad, self.w_down),
            "dW_down": lambda: torch.bmm(self.grad.transpose(1, 2), self.hidden),
            "dz W_up": lambda: torch.bmm(self.grad_z, self.w_up),
            "dW_up": lambda: torch.bmm(self.grad_z.transpose(1, 2), self.x),
        }

    def forward(self) -> tuple[Tensor, Tensor]:
        """Up- and down-projection."""
        up, down, *_ = self.products().values()
        return up(), down()

    def backward(self) -> None:
        """Gradients of both projections' inputs and weights."""
        for product in list(self.products().values())[2:]:
            product()

    @staticmethod
    def version() -> str:
        """Version of PyTorch, whose cuBLAS it is."""
        return torch.__version__
