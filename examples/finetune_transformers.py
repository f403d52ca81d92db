"""Fine-tunes a mixture-of-experts model of transformers: first on transformers' own experts, then on scattermoe's.

The text is the Python standard library's own source. Without --model, the model is a small OLMoE with random weights that
reads bytes; with it, any checkpoint that transformers can load, read by its own tokenizer.

    python examples/finetune_transformers.py                  # under two minutes on two cores; uses a GPU if there is one
    python examples/finetune_transformers.py --model allenai/OLMoE-1B-7B-0924 --dtype bfloat16 --save runs/olmoe
"""

import argparse
import time
from pathlib import Path

import torch
from lm.data import VOCABULARY, load_corpus, random_batch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

import scattermoe.transformers

CHARACTERS = 1 << 21  # of the text, for a tokenizer: more than a short run reads


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME", help="a checkpoint's name or folder (a small random model)")
    parser.add_argument("--steps", type=int, default=40, help="on scattermoe; a quarter of it before (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step (%(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence (%(default)s)")
    parser.add_argument("--learning-rate", type=float, help="(1e-3, for a checkpoint 1e-5)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights (%(default)s)"
    )
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the model there, as transformers reads it")
    return parser.parse_args(arguments)


def load(name: str | None, dtype: torch.dtype) -> tuple[PreTrainedModel, Tensor]:
    """A model, and the text as a line of its tokens."""
    text = load_corpus().train
    if name is not None:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        if model.config.vocab_size == VOCABULARY:  # one that this program has saved
            return model, text
        words = bytes(text[:CHARACTERS].tolist()).decode(errors="replace")
        return model, torch.tensor(AutoTokenizer.from_pretrained(name)(words)["input_ids"])
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=32,
        num_experts_per_tok=4,
        eos_token_id=None,
        pad_token_id=None,
    )
    return OlmoeForCausalLM(config).to(dtype), text


def swap(model: PreTrainedModel) -> None:
    """Puts scattermoe into the model: by transformers' experts interface or, outside of it, block by block."""
    try:
        model.set_experts_implementation("scattermoe")
    except ValueError as reason:
        print(reason)
        print(scattermoe.replace_moe(model))


def train(model: PreTrainedModel, text: Tensor, options: argparse.Namespace, first: int, steps: int) -> float:
    """Trains for some steps and returns tokens per second; the first step, in which much happens once, does not count."""
    # For each call its own: a swapped block may keep its weights in other parameters.
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    seconds = []
    for step in range(first, first + steps):
        ids, _ = random_batch(text, options.batch_size, options.length, seed=0, step=step)
        ids = ids.to(model.device)
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
        if step % 5 == 0 or step == first + steps - 1:
            print(f"  step {step:4d}  loss {value:.3f}")
    return ids.numel() / sorted(seconds[1:] or seconds)[len(seconds[1:]) // 2]


def main() -> None:
    """Trains before and after the swap."""
    options = parse_arguments()
    torch.manual_seed(0)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.learning_rate = options.learning_rate or (1e-3 if options.model is None else 1e-5)
    model, text = load(options.model, getattr(torch, options.dtype))
    model.to(options.device).train()

    before_steps = max(1, options.steps // 4)
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters, on {model.config._experts_implementation}")
    before = train(model, text, options, 0, before_steps)
    swap(model)
    print("on scattermoe")
    after = train(model, text, options, before_steps, options.steps)
    print(f"tokens per second: {before:,.0f} before, {after:,.0f} after, {after / before:.2f} times as many")
    if options.save is not None:
        model.save_pretrained(options.save)
        print(f"saved to {options.save}")


if __name__ == "__main__":
    main()
