"""The language model: pre-norm Transformer blocks of Mixture-of-Attention and a Mixture-of-Experts MLP."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scattermoe

from .data import VOCABULARY


@dataclass(frozen=True)
class Config:
    """Everything that defines a model and how long it trains.

    A block has `attention_experts` pairs of query and output projections, of which each token takes
    `attention_top_k`, and `mlp_experts` MLPs, of which it takes `mlp_top_k`.
    """

    depth: int = 4
    shared_layers: bool = False  # one block applied `depth` times
    hidden_size: int = 192
    attention_experts: int = 8
    attention_top_k: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    mlp_experts: int = 8
    mlp_top_k: int = 2
    mlp_size: int = 256
    activation: str = "swiglu"
    jitter: float = 0.0
    init_std: float = 0.05
    context: int = 256
    batch_size: int = 8
    steps: int = 500
    learning_rate: float = 3e-3
    balance_weight: float = 0.01
    z_weight: float = 1e-3


PRESETS = {
    # Both halves of a block are sparse, as in JetMoE (Shen et al. 2024).
    "default": Config(),
    # Switch Transformer (Fedus et al. 2021): dense attention, one ReLU MLP per token, and jitter on the router's input.
    # A mixture of one attention expert is ordinary multi-head attention.
    "switch": Config(
        attention_experts=1,
        attention_top_k=1,
        kv_heads=6,
        mlp_top_k=1,
        mlp_size=768,
        activation="relu",
        jitter=0.01,
    ),
    # Sparse Universal Transformer (Tan et al. 2023): one block with more experts, used at every depth.
    "universal": Config(shared_layers=True, attention_experts=16, mlp_experts=24),
}


class Block(nn.Module):
    """x + MoA(norm(x)), then x + MoE(norm(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.attention = scattermoe.MixtureOfAttention(
            config.hidden_size,
            config.attention_experts,
            config.attention_top_k,
            config.kv_heads,
            config.head_dim,
            causal=True,
            init_std=config.init_std,
        )
        self.mlp_norm = nn.RMSNorm(config.hidden_size)
        self.mlp = scattermoe.MoE(
            config.hidden_size,
            config.mlp_size,
            config.mlp_experts,
            config.mlp_top_k,
            activation=config.activation,
            jitter=config.jitter,
            init_std=config.init_std,
        )

    def forward(self, x: Tensor, cache=None):
        attended, attention_aux = self.attention(self.attention_norm(x), cache=cache)
        x = x + attended
        transformed, mlp_aux = self.mlp(self.mlp_norm(x))
        return x + transformed, attention_aux, mlp_aux


class LanguageModel(nn.Module):
    """Predicts the next byte.

    Args:
        config: the shape of the model.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(1 if config.shared_layers else config.depth))
        # A shared block cannot tell at which depth it is applied unless it is told.
        self.depth_embedding = nn.Embedding(config.depth, config.hidden_size) if config.shared_layers else None
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(self.head.weight, std=0.5 * config.hidden_size**-0.5)
        if self.depth_embedding is not None:
            nn.init.normal_(self.depth_embedding.weight, std=0.1)

    def forward(self, tokens: Tensor, caches: list | None = None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Runs the model.

        Args:
            tokens: int64 [batch, length].
            caches: one key-value cache per depth when decoding, as `make_caches` returns.

        Returns:
            logits [batch, length, 256]; the load of the experts, [depth, experts], of each kind of layer that has a choice;
            and the weighted sum of the routers' losses.
        """
        config = self.config
        x = self.embedding(tokens)
        loads: dict[str, list[Tensor]] = {"attention": [], "mlp": []}
        router_loss = x.new_zeros((), dtype=torch.float32)
        for depth in range(config.depth):
            if self.depth_embedding is not None:
                x = x + self.depth_embedding.weight[depth]
            block = self.blocks[depth % len(self.blocks)]
            x, attention_aux, mlp_aux = block(x, None if caches is None else caches[depth])
            for name, aux in (("attention", attention_aux), ("mlp", mlp_aux)):
                loads[name].append(aux.expert_load)
                router_loss = router_loss + config.balance_weight * aux.load_balancing_loss
                router_loss = router_loss + config.z_weight * aux.z_loss
        stacked = {name: torch.stack(load) for name, load in loads.items() if load[0].numel() > 1}
        return self.head(self.norm(x)), stacked, router_loss

    def make_caches(self, batch_size: int, length: int) -> list:
        """Empty key-value caches for decoding up to `length` tokens: one per depth, even where layers are shared."""
        return [
            self.blocks[depth % len(self.blocks)].attention.make_cache(batch_size, length)
            for depth in range(self.config.depth)
        ]

    @torch.no_grad()
    def generate(self, prompt: Tensor, length: int, temperature: float, generator: torch.Generator) -> Tensor:
        """Continues `prompt` (int64 [prompt length]) by `length` sampled tokens, one forward pass of one token each."""
        caches = self.make_caches(1, prompt.numel() + length)
        tokens = prompt[None]
        step = tokens
        for _ in range(length):
            logits = self(step, caches)[0][0, -1].float()
            probability = F.softmax(logits / temperature, dim=-1).cpu()
            step = torch.multinomial(probability, 1, generator=generator).to(prompt.device)[None]
            tokens = torch.cat((tokens, step), dim=1)
        return tokens[0]
