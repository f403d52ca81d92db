"""Writes a mixture-of-experts layer to a folder in the three forms that a C++ program can run, with an input of its own length.

python examples/cpp/export.py FOLDER
"""

import sys
from pathlib import Path

import torch

import scattermoe


class Layer(torch.nn.Module):
    """A layer as a model has them: normalised, with a residual connection; ``[T, hidden_size]`` to the same."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(hidden_size)
        self.moe = scattermoe.MoE(hidden_size, 2 * hidden_size, num_experts=8, top_k=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.moe(self.norm(x))[0]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    layer = Layer(hidden_size=64).eval().requires_grad_(False)
    x = torch.randn(16, 64)
    tokens = torch.export.Dim("tokens", min=2, max=65536)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},))
    torch.export.save(exported, folder / "layer.pt2")
    torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "layer.aoti.pt2"))
    torch.jit.trace(layer, (x,)).save(str(folder / "layer.pt"))
    # Another number of tokens than what was traced.
    x = torch.randn(100, 64)
    torch.save(x, folder / "x.pt")
    torch.save(layer(x), folder / "expected.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
