"""The layers that are measured, and how tokens are spread over experts."""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A SwiGLU MoE MLP and a batch: tokens, hidden size, width of one expert, experts, experts per token."""

    tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    @property
    def slots(self) -> int:
        """Assignments of a token to an expert."""
        return self.tokens * self.top_k

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the three products of the forward pass; backward has twice as many."""
        return 6 * self.slots * self.hidden_size * self.intermediate_size

    def __str__(self) -> str:
        return ",".join(map(str, (self.tokens, self.hidden_size, self.intermediate_size, self.num_experts, self.top_k)))


# Layers of published models, and those that the SonicMoE paper (arXiv 2512.14080) reports.
SHAPES = {
    "mixtral": Shape(8192, 4096, 14336, 8, 2),
    "qwen3-30b": Shape(32768, 2048, 768, 128, 8),
    "olmoe": Shape(32768, 2048, 1024, 64, 8),
    "qwen3-235b": Shape(32768, 4096, 1536, 128, 8),
    "dsv3-quarter": Shape(16384, 7168, 2048, 64, 8),
    "qwen3-next": Shape(32768, 2048, 512, 512, 10),
    "granite-3b": Shape(32768, 1536, 512, 40, 8),
    "sonic-1.4b": Shape(40960, 768, 256, 128, 8),
    "sonic-7b": Shape(24576, 1536, 256, 128, 8),
    "sonic-30b": Shape(32768, 4096, 256, 256, 16),
    "sonic-120b": Shape(32768, 4096, 512, 256, 16),
}

# So small that the GPU is done before the next call arrives: what is left is the host's share of a call. With fewer rows for an
# expert, or narrower ones, some implementations would take other kernels than they have for a real layer, or none.
HOST_SHAPE = Shape(256, 256, 128, 8, 2)

ROUTINGS = ("balanced", "zipf", "empty")


def parse_shape(text: str) -> tuple[str, Shape]:
    """A shape by its name, or as T,H,I,E,K, with its name."""
    if text in SHAPES:
        return text, SHAPES[text]
    try:
        shape = Shape(*map(int, text.split(",")))
    except (TypeError, ValueError):
        raise ValueError(f"expected one of {', '.join(SHAPES)} or T,H,I,E,K, got {text}") from None
    if min(shape.tokens, shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k) < 1:
        raise ValueError(f"expected sizes of at least 1, got {text}")
    if shape.top_k > shape.num_experts:
        raise ValueError(f"expected K <= E, got {text}")
    return text, shape


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """The option --shapes, all of them by default."""
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, default=list(SHAPES.items()), metavar="SHAPE",
        help=f"{', '.join(SHAPES)}, or T,H,I,E,K (all)",
    )  # fmt: skip


def draw_expert_ids(shape: Shape, routing: str, generator: torch.Generator) -> Tensor:
    """Distinct experts for each token.

    Args:
        shape: of the layer.
        routing: ``balanced`` draws them uniformly; ``zipf`` without replacement with probabilities proportional to
            1, 1/2, 1/3, ... in a random order of the experts; ``empty`` uniformly with a tenth of the experts left out.
        generator: of the random numbers, on the device of the result.

    Returns:
        int64 ``[T, K]``.
    """
    experts, device = shape.num_experts, generator.device
    order = torch.randperm(experts, generator=generator, device=device)
    log_probability = torch.zeros(experts, device=device)
    if routing == "zipf":
        log_probability = -torch.log(order + 1.0)
    elif routing == "empty":
        left_out = min(-(-experts // 10), experts - shape.top_k)
        log_probability = torch.where(order < left_out, -torch.inf, log_probability)
    elif routing != "balanced":
        raise ValueError(f"expected routing to be one of {', '.join(ROUTINGS)}, got {routing}")
    # The top k of log-probabilities plus Gumbel noise are a draw without replacement (Gumbel top-k trick).
    noise = torch.empty(shape.tokens, experts, device=device).exponential_(generator=generator).log_().neg_()
    return (noise + log_probability).topk(shape.top_k, dim=-1).indices
