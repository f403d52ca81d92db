"""PyTorch alone: sort, copy the rows into groups, ``torch.nn.functional.grouped_mm``, copy back; eager or compiled.

The way that the grouped_mm backend of Hugging Face transformers goes.
"""

import torch
from problem import Problem
from torch import Tensor
from torch.nn import functional as F


def grouped_layer(x: Tensor, w_up: Tensor, w_down: Tensor, gates: Tensor, expert_ids: Tensor) -> Tensor:
    """A SwiGLU MoE MLP out of PyTorch's operators."""
    top_k, flat = expert_ids.shape[1], expert_ids.flatten()
    order = flat.argsort(stable=True)
    bounds = torch.arange(w_up.shape[0], device=flat.device)
    offsets = torch.searchsorted(flat[order], bounds, right=True, out_int32=True)
    z = F.grouped_mm(x[order // top_k], w_up.transpose(1, 2), offs=offsets)
    gate, up = z.chunk(2, dim=-1)
    rows = F.grouped_mm(F.silu(gate) * up, w_down.transpose(1, 2), offs=offsets)
    rows = rows * gates.flatten()[order].unsqueeze(1)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return rows[position].view(x.shape[0], top_k, -1).sum(dim=1)


class Layer:
    """See :mod:`peers`."""

    def __init__(self, problem: Problem, compiled: bool = False) -> None:
        self.problem = problem
        self.x, self.gates = (value.detach().requires_grad_() for value in (problem.x, problem.gates.to(problem.dtype)))
        self.w_up, self.w_down = (value.detach().requires_grad_() for value in (problem.w_up, problem.w_down))
        self.leaves = [self.x, self.gates, self.w_up, self.w_down]
        self.layer = grouped_layer
        if compiled:
            # Without the reset the second shape would get kernels for any shape, which are slower.
            torch._dynamo.reset()
            self.layer = torch.compile(grouped_layer, dynamic=False)

    def forward(self) -> Tensor:
        """One call of the layer."""
        return self.layer(self.x, self.w_up, self.w_down, self.gates, self.problem.expert_ids)

    def weight_gradient(self, expert: int) -> tuple[Tensor, Tensor]:
        """Gradients of one expert."""
        return self.w_up.grad[expert], self.w_down.grad[expert]

    @staticmethod
    def version() -> str:
        """Version of PyTorch."""
        return torch.__version__
