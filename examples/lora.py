"""Fine-tunes a sparse language model by low-rank adapters on its experts alone, and merges them into its weights.

The base model learns the Python standard library's own source; the adapters then teach it to read and write the same source
in capitals. At the end the merged model computes what the adapted one did, and the unmerged one what the base did.

    python examples/lora.py                                    # under a minute on two cores; uses a GPU if there is one
    python examples/lora.py --base runs/default/checkpoint.pt  # on a model that examples/train.py has trained
    python examples/lora.py --rank 16 --save adapters.pt
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from lm.data import even_windows, load_corpus, random_batch
from lm.model import Config, LanguageModel
from lm.training import cross_entropy
from torch import Tensor, nn

from scattermoe import lora

SMALL = Config(depth=2, hidden_size=96, head_dim=24, mlp_size=128, mlp_experts=8, context=128, learning_rate=5e-3)
HELD_OUT_WINDOWS = 16


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", type=Path, metavar="CHECKPOINT", help="of examples/train.py (a small model, trained now)"
    )
    parser.add_argument("--base-steps", type=int, default=100, help="to train that small model for (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="to train the adapters for (%(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (%(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, help="in front of the adapters (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the adapters there")
    return parser.parse_args(arguments)


def capitals(text: Tensor) -> Tensor:
    """Bytes of text with its small letters made capital."""
    return torch.where((text >= ord("a")) & (text <= ord("z")), text - 32, text)


def train(model: LanguageModel, text: Tensor, parameters: Iterable[nn.Parameter], steps: int, device: str) -> None:
    """Takes some steps on random windows of a text."""
    config = model.config
    optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=max(steps, 2))
    model.train()
    for step in range(steps):
        inputs, targets = (t.to(device) for t in random_batch(text, config.batch_size, config.context, 0, step))
        logits, _, router_loss = model(inputs)
        loss = cross_entropy(logits, targets)
        (loss + router_loss).backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"  step {step:4d}  loss {loss.item():.3f}")
    model.eval()


@torch.no_grad()
def held_out(model: LanguageModel, text: Tensor, device: str) -> tuple[float, Tensor]:
    """The loss on text that was not trained on, and the logits that it comes from."""
    inputs, targets = (t.to(device) for t in even_windows(text, HELD_OUT_WINDOWS, model.config.context))
    logits = model(inputs)[0]
    return cross_entropy(logits, targets).item(), logits


def main() -> None:
    """Trains the base, then the adapters, then merges and unmerges them."""
    options = parse_arguments()
    torch.manual_seed(0)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    corpus = load_corpus()
    if options.base is None:
        model = LanguageModel(SMALL).to(device)
        print("base model, on source code")
        train(model, corpus.train, model.parameters(), options.base_steps, device)
    else:
        state = torch.load(options.base, map_location="cpu", weights_only=True)
        model = LanguageModel(Config(**state["config"])).to(device).eval()
        model.load_state_dict(state["model"])
    shouted = capitals(corpus.held_out)
    base_loss, base_logits = held_out(model, shouted, device)

    adapted = lora.add_adapters(model, r=options.rank, alpha=2 * options.rank, dropout=options.dropout)
    for entry in adapted:
        print(f"{entry.path}: {', '.join(entry.targets)}, {entry.num_parameters:,} parameters")
    print("adapters, on source code in capitals")
    train(model, capitals(corpus.train), lora.adapter_parameters(model), options.steps, device)
    adapted_loss, adapted_logits = held_out(model, shouted, device)
    trained = sum(p.numel() for p in lora.adapter_parameters(model))
    print(f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters were trained")
    print(f"held out, in capitals: {base_loss:.3f} nats per byte before, {adapted_loss:.3f} after")

    if options.save is not None:
        torch.save(lora.adapter_state_dict(model), options.save)
        print(f"saved to {options.save}")
    lora.merge(model)
    merged_loss, merged_logits = held_out(model, shouted, device)
    difference = ((merged_logits - adapted_logits).abs().max() / adapted_logits.abs().max()).item()
    print(f"merged: {merged_loss:.3f} nats per byte, largest relative difference of the logits {difference:.1e}")
    lora.unmerge(model)
    lora.remove(model)
    same = torch.equal(held_out(model, shouted, device)[1], base_logits)
    print("without the adapters it is the base model" + (", bit by bit" if same else ""))


if __name__ == "__main__":
    main()
