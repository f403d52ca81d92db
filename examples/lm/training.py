"""One training run: its optimiser, its checkpoints, and how it is measured."""

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scattermoe

from .data import VOCABULARY, random_batch
from .model import Config, LanguageModel


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per byte."""
    return F.cross_entropy(logits.float().view(-1, VOCABULARY), targets.reshape(-1))


def balance(loads: dict[str, Tensor]) -> float:
    """How evenly experts are used: the effective number of experts, exp(entropy of the load), over the real number.

    1 is an even load, 1/E everything on one expert; the mean over layers that have a choice.
    """
    layers = [scattermoe.load_statistics(load).effective / load.size(-1) for load in loads.values()]
    return torch.cat(layers).mean().item() if layers else 1.0


@dataclass
class History:
    """What the pictures are drawn from. `held_out` has fewer points, each with its step."""

    train_loss: list[float] = field(default_factory=list)
    balance: list[float] = field(default_factory=list)
    held_out_step: list[int] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)


class Run:
    """A model with everything needed to go on training it.

    Args:
        config: the shape of the model and the length of the training.
        preset: the name `config` is known by.
        seed: decides the initial weights and which text is seen when.
        device: where to train.
        dtype: what matrix products are computed in; weights and optimiser stay in float32.
        compile_model: whether to train through `torch.compile`.
    """

    def __init__(
        self, config: Config, preset: str, seed: int, device: torch.device, dtype: torch.dtype, compile_model: bool
    ) -> None:
        self.config, self.preset, self.seed = config, preset, seed
        self.device, self.dtype = device, dtype
        self.step = 0
        self.history = History()
        torch.manual_seed(seed)
        self.model = LanguageModel(config).to(device)
        self.forward = torch.compile(self.model) if compile_model else self.model
        # Norms, biases and embeddings are not decayed towards zero; matrices are.
        decayed = [p for name, p in self.model.named_parameters() if p.ndim > 1 and "embedding" not in name]
        others = [p for name, p in self.model.named_parameters() if p.ndim <= 1 or "embedding" in name]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )

    def autocast(self) -> torch.autocast:
        """The context to run the model in."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over the first twentieth, then half a cosine down to a twentieth."""
        warm_up = max(1, self.config.steps // 20)
        if step < warm_up:
            return self.config.learning_rate * (step + 1) / warm_up
        progress = (step - warm_up) / max(1, self.config.steps - warm_up)
        return self.config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))

    def train_step(self, text: Tensor) -> None:
        """Takes one optimiser step on a random batch of `text` and notes the loss and the balance in the history."""
        config = self.config
        inputs, targets = random_batch(text, config.batch_size, config.context, self.seed, self.step)
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.forward.train()
        with self.autocast():
            logits, loads, router_loss = self.forward(inputs)
            loss = cross_entropy(logits, targets)
        (loss + router_loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.history.train_loss.append(loss.item())
        self.history.balance.append(balance(loads))

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Measures the model on text it does not train on.

        Returns:
            the mean nats per byte, and the load of the experts [depth, experts] of each kind of layer.
        """
        self.forward.eval()
        total = 0.0
        loads: dict[str, Tensor] = {}
        for chunk_inputs, chunk_targets in self._chunks(inputs, targets):
            with self.autocast():
                logits, chunk_loads, _ = self.forward(chunk_inputs.to(self.device))
            total += cross_entropy(logits, chunk_targets.to(self.device)).item() * chunk_inputs.numel()
            loads = {name: load + loads.get(name, 0) for name, load in chunk_loads.items()}
        return total / inputs.numel(), loads

    def _chunks(self, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(inputs.split(self.config.batch_size), targets.split(self.config.batch_size), strict=True)

    def save(self, path: Path) -> None:
        """Writes a checkpoint; a crash while writing leaves the previous one whole."""
        state = {
            "config": asdict(self.config),
            "preset": self.preset,
            "seed": self.seed,
            "step": self.step,
            "history": asdict(self.history),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def restore(self, state: dict) -> None:
        """Goes on where the run that saved `state` stopped; this run must have been made from its configuration."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.history = History(**state["history"])
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())
