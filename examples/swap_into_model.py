"""Swaps scattermoe into an existing PyTorch model: the same weights, the same numbers, less time.

The model is as one finds it: a mixture of experts written as a loop over modules. `scattermoe.replace_moe` finds these
layers, stacks their weights and runs them on scattermoe; the rest of the model stays as it is. Outputs and gradients are
compared before and after.

    python examples/swap_into_model.py
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scattermoe

# ---- The existing model ----------------------------------------------------------------------------------------------


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), as in Llama."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LoopMoE(nn.Module):
    """Each token goes through the `top_k` experts its router likes best, one expert after another."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(GatedMLP(hidden_size, intermediate_size) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        gates, expert_ids = self.router(tokens).softmax(dim=-1).topk(self.top_k, dim=-1)
        gates = gates / gates.sum(dim=-1, keepdim=True)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, choice = torch.where(expert_ids == index)
            y = y.index_add(0, token, gates[token, choice, None] * expert(tokens[token]))
        return y.view_as(x)


class Model(nn.Module):
    """A stack of MoE layers with residual connections."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LoopMoE(hidden_size, intermediate_size, num_experts, top_k) for _ in range(depth))
        self.norms = nn.ModuleList(nn.RMSNorm(hidden_size) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


# ---- The comparison --------------------------------------------------------------------------------------------------


def forward_and_backward(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """The output, the gradient of its mean square with respect to the input, and the milliseconds both took."""
    x = x.clone().requires_grad_()
    began = time.perf_counter()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), x.grad, 1e3 * (time.perf_counter() - began)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def main() -> None:
    """Swaps and compares."""
    torch.manual_seed(0)
    model = Model(hidden_size=256, intermediate_size=256, num_experts=16, top_k=4, depth=2)
    x = torch.randn(2, 128, 256)

    forward_and_backward(model, x)  # the first call of anything is slow
    y, grad, milliseconds = forward_and_backward(model, x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    print(scattermoe.replace_moe(model))
    forward_and_backward(model, x)
    swapped_y, swapped_grad, swapped_milliseconds = forward_and_backward(model, x)

    print(f"loop over experts  {milliseconds:7.1f} ms forward and backward")
    print(f"scattermoe         {swapped_milliseconds:7.1f} ms")
    print(
        f"largest relative difference: output {difference(swapped_y, y):.1e}, gradient {difference(swapped_grad, grad):.1e}"
    )
    torch.testing.assert_close(swapped_y, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(swapped_grad, grad, rtol=1e-4, atol=1e-7)
    print("the same numbers")
    model.load_state_dict(state)
    print("checkpoints of the old model load into the new one")


if __name__ == "__main__":
    main()
