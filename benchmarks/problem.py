"""One layer with random data, the same in every process, and the reference that results are compared with."""

import torch
from harness import row_error
from shapes import Shape, draw_expert_ids
from torch import Tensor
from torch.nn import functional as F

# Largest error, relative to the reference's norm, that a correct implementation stays under: several roundings of
# intermediate results to the dtype, and the cancellation in sums over the hidden size.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}


class Problem:
    """Weights, an input with its routing, and the gradient that reaches the output.

    Attributes:
        x: ``[T, H]``.
        w_up: ``[E, 2 * I, H]``, gate rows first.
        w_down: ``[E, H, I]``.
        gates: float32 ``[T, K]`` whose values bfloat16 and float16 hold, so that each implementation can have them in its dtype.
        expert_ids: int64 ``[T, K]``.
        grad: ``[T, H]``.
    """

    def __init__(self, shape: Shape, routing: str, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        experts, hidden, width = shape.num_experts, shape.hidden_size, shape.intermediate_size

        def random(*size: int, scale: float = 1.0) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device).normal_(0, scale, generator=generator)

        self.shape, self.routing, self.dtype, self.device = shape, routing, dtype, device
        self.x, self.grad = random(shape.tokens, hidden), random(shape.tokens, hidden)
        self.w_up = random(experts, 2 * width, hidden, scale=hidden**-0.5)
        self.w_down = random(experts, hidden, width, scale=width**-0.5)
        logits = torch.randn(shape.tokens, shape.top_k, device=device, generator=generator)
        # Rounded to multiples of 1/256: exact in every dtype.
        self.gates = logits.softmax(dim=-1).mul(256).round().clamp_min(1).div(256)
        self.expert_ids = draw_expert_ids(shape, routing, generator)


class Reference:
    """Exact results, in float64, for a sample of tokens and for a sample of experts and their hidden units.

    Output and input gradients of a token need only its own experts; weight gradients of a hidden unit need only that
    unit: so a sample is exact at a fraction of the layer's cost. The experts are those with the fewest, the median and
    the most tokens; the gradients of one without any tokens must be zero.
    """

    def __init__(self, problem: Problem, num_tokens: int = 32, num_units: int = 64, seed: int = 1) -> None:
        generator = torch.Generator(problem.device).manual_seed(seed)
        shape = problem.shape
        self.tokens = torch.randperm(shape.tokens, generator=generator, device=problem.device)[:num_tokens]
        x, grad = problem.x[self.tokens].double(), problem.grad[self.tokens].double()
        gates, ids = problem.gates[self.tokens].double(), problem.expert_ids[self.tokens]
        self.y, self.grad_x, self.grad_gates = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(gates)
        # One expert's weights in float64 at a time: all of a large layer's would fill a GPU that several processes share.
        for expert in ids.unique().tolist():
            row, choice = (ids == expert).nonzero(as_tuple=True)
            x_rows = x[row].requires_grad_()
            gate, up = F.linear(x_rows, problem.w_up[expert].double()).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, problem.w_down[expert].double())
            weight = gates[row, choice].unsqueeze(1)
            self.grad_x.index_add_(0, row, *torch.autograd.grad(rows, x_rows, grad[row] * weight))
            self.y.index_add_(0, row, rows.detach() * weight)
            self.grad_gates[row, choice] = (rows.detach() * grad[row]).sum(dim=1)

        units = torch.randperm(shape.intermediate_size, generator=generator, device=problem.device)[:num_units]
        self.units, self.up_rows = units, torch.cat([units, units + shape.intermediate_size])
        by_count = problem.expert_ids.flatten().bincount(minlength=shape.num_experts).argsort().tolist()
        self.experts = sorted({by_count[0], by_count[len(by_count) // 2], by_count[-1]})
        self.weight_gradients = [self._weight_gradients(problem, expert) for expert in self.experts]

    def _weight_gradients(self, problem: Problem, expert: int) -> tuple[Tensor, Tensor]:
        row, choice = (problem.expert_ids == expert).nonzero(as_tuple=True)
        w_up = problem.w_up[expert][self.up_rows].double().requires_grad_()
        w_down = problem.w_down[expert][:, self.units].double().requires_grad_()
        gate, up = F.linear(problem.x[row].double(), w_up).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, w_down)  # what these hidden units add to the output
        grad = problem.grad[row].double() * problem.gates[row, choice].double().unsqueeze(1)
        return torch.autograd.grad(y, [w_up, w_down], grad)

    def error_of_output(self, y: Tensor) -> float:
        """The largest relative error of a row of y, ``[T, H]``."""
        return row_error(y[self.tokens], self.y)

    def errors(
        self, y: Tensor, grad_x: Tensor, grad_gates: Tensor, weight_gradients: list[tuple[Tensor, Tensor]]
    ) -> dict[str, float]:
        """How far results are from the exact ones.

        Args:
            y: ``[T, H]``.
            grad_x: ``[T, H]``.
            grad_gates: ``[T, K]``.
            weight_gradients: ``[2 * I, H]`` with gate rows first and ``[H, I]`` of each expert in ``self.experts``.

        Returns:
            relative errors by name: the largest of a row for y and the gradient of x, that of the whole for the gates and
            for each expert's weights, whose rows can cancel to next to nothing.
        """

        def whole(result: Tensor, exact: Tensor) -> float:
            return row_error(result.reshape(1, -1), exact.reshape(1, -1))

        found = [(up[self.up_rows], down[:, self.units]) for up, down in weight_gradients]
        pairs = list(zip(found, self.weight_gradients, strict=True))
        return {
            "y": self.error_of_output(y),
            "grad_x": row_error(grad_x[self.tokens], self.grad_x),
            "grad_gates": whole(grad_gates[self.tokens], self.grad_gates),
            **{f"grad_w_up[{e}]": whole(a[0], b[0]) for e, (a, b) in zip(self.experts, pairs, strict=True)},
            **{f"grad_w_down[{e}]": whole(a[1], b[1]) for e, (a, b) in zip(self.experts, pairs, strict=True)},
        }
