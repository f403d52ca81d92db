"""MegaBlocks (github.com/databricks/megablocks): its dropless MLP with a routing that is given.

``grouped`` is a loop of one cuBLAS product for each expert (package grouped_gemm), ``sparse`` its block-sparse kernels.
"""

from importlib.metadata import PackageNotFoundError, version

import torch
from megablocks.layers.arguments import Arguments
from megablocks.layers.dmoe import ParallelDroplessMLP
from problem import Problem
from torch import Tensor
from torch.nn import functional as F


class Layer:
    """See :mod:`peers`."""

    def __init__(self, problem: Problem, mlp_impl: str) -> None:
        if problem.device != "cuda" or problem.dtype == torch.float32:
            raise NotImplementedError("MegaBlocks needs a GPU and bfloat16 or float16")
        self.problem, shape = problem, problem.shape
        if mlp_impl == "sparse" and shape.intermediate_size % 128:
            raise NotImplementedError("MegaBlocks' sparse kernels need an expert width that 128 divides")
        arguments = Arguments(
            hidden_size=shape.hidden_size,
            ffn_hidden_size=shape.intermediate_size,
            num_layers=1,
            bias=False,
            return_bias=False,
            activation_fn=F.silu,
            moe_num_experts=shape.num_experts,
            moe_top_k=shape.top_k,
            moe_loss_weight=0.0,
            mlp_type="glu",
            mlp_impl=mlp_impl,
            fp16=problem.dtype == torch.float16,
            bf16=problem.dtype == torch.bfloat16,
            device=torch.device(problem.device),
        )
        self.mlp = ParallelDroplessMLP(arguments)
        gate, up = problem.w_up.chunk(2, dim=1)
        parameters = dict(self.mlp.mlp.named_parameters())
        with torch.no_grad():
            for name, value in (("w1", gate), ("v1", up), ("w2", problem.w_down.transpose(1, 2))):
                parameters[name].view(value.shape).copy_(value)
        self.weights = [parameters[name] for name in ("w1", "v1", "w2")]
        self.x, self.gates = (value.detach().requires_grad_() for value in (problem.x, problem.gates.to(problem.dtype)))
        self.expert_ids = problem.expert_ids.int()
        self.leaves = [self.x, self.gates, *self.weights]

    def forward(self) -> Tensor:
        """One call of the layer."""
        return self.mlp.forward_once(self.x, self.gates, self.expert_ids)[0]

    def weight_gradient(self, expert: int) -> tuple[Tensor, Tensor]:
        """Gradients of one expert."""
        shape = self.problem.shape
        rows = (weight.grad.view(shape.num_experts, shape.intermediate_size, -1)[expert] for weight in self.weights)
        gate, up, down = rows
        return torch.cat([gate, up]), down.t()

    @staticmethod
    def version() -> str:
        """Version of the package."""
        try:
            return version("megablocks")
        except PackageNotFoundError:  # a folder copied by hand
            import megablocks

            return getattr(megablocks, "__version__", "unknown")
