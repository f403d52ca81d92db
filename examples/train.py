"""Trains a small sparse language model, byte by byte, on the Python standard library's own source.

Its blocks are Mixture-of-Attention and a gated Mixture-of-Experts MLP. A run ends with the loss on files the model has
never seen beside that of a byte-bigram model, a sample of what it writes, and two pictures in the output folder.

    python examples/train.py                       # a few minutes on two cores; uses a GPU if there is one
    python examples/train.py --preset switch       # Switch Transformer: top-1 experts
    python examples/train.py --preset universal    # Universal Transformer: one block, used at every depth
    python examples/train.py --resume              # go on from the last checkpoint of the same output folder

The parts: lm/data.py (text, bigram model), lm/model.py (the model and its presets), lm/training.py (optimiser,
checkpoints), lm/plots.py (the curve).
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path

import torch
from lm import plots
from lm.data import Corpus, bigram_loss, even_windows, load_corpus
from lm.model import PRESETS, Config
from lm.training import Run
from tqdm import tqdm

import scattermoe

HELD_OUT_BYTES_ALONG = 1 << 13  # measured twenty times along the way


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="default", help="which model to train (%(default)s)")
    parser.add_argument("--steps", type=int, help="optimiser steps in all (the preset's own number)")
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="save a checkpoint and stop early, to resume later")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where everything is written (runs/PRESET)")
    parser.add_argument("--seed", type=int, default=0, help="weights and order of the text (%(default)s)")
    parser.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=True,
        metavar="CHECKPOINT",
        help="go on from a checkpoint (DIR/checkpoint.pt if none is named); preset, seed and steps are the checkpoint's",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of matrix products (bfloat16 on a GPU, float32 on a CPU)"
    )
    parser.add_argument("--compile", action="store_true", help="train through torch.compile (a minute's wait at first)")
    parser.add_argument("--prompt", default="def ", help="what the sample continues (%(default)r)")
    parser.add_argument("--sample", type=int, default=400, metavar="BYTES", help="length of the sample (%(default)s)")
    parser.add_argument(
        "--held-out",
        type=int,
        default=1 << 16,
        metavar="BYTES",
        help="of held-out text to measure at the end (%(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if not options.prompt:
        parser.error("--prompt must not be empty")
    options.out = options.out or Path("runs") / options.preset
    if options.resume is True:
        options.resume = options.out / "checkpoint.pt"
    if options.resume and not options.resume.is_file():
        parser.error(f"there is no checkpoint {options.resume}")
    options.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options.dtype = options.dtype or ("bfloat16" if options.device.type == "cuda" else "float32")
    return options


def start(options: argparse.Namespace) -> Run:
    """Makes the run the command line asks for, new or resumed."""
    dtype = getattr(torch, options.dtype)
    if options.resume is None:
        config, preset, seed, state = PRESETS[options.preset], options.preset, options.seed, None
    else:
        state = torch.load(options.resume, map_location=options.device, weights_only=True)
        config, preset, seed = Config(**state["config"]), state["preset"], state["seed"]
    if options.steps is not None:
        config = dataclasses.replace(config, steps=options.steps)
    run = Run(config, preset, seed, options.device, dtype, options.compile)
    if state is not None:
        run.restore(state)
    return run


def train(run: Run, corpus: Corpus, checkpoint: Path, stop_at: int) -> None:
    """Trains until step `stop_at` with a progress bar, measuring and saving along the way."""
    config = run.config
    measured = even_windows(corpus.held_out, HELD_OUT_BYTES_ALONG // config.context, config.context)
    interval = max(1, config.steps // 20)
    bar = tqdm(total=config.steps, initial=run.step, unit="step", dynamic_ncols=True)
    try:
        while run.step < stop_at:
            began = time.perf_counter()
            run.train_step(corpus.train)
            speed = config.batch_size * config.context / (time.perf_counter() - began)
            recent = run.history.train_loss[-20:]
            bar.update()
            bar.set_postfix_str(
                f"loss {sum(recent) / len(recent):.3f}, {speed / 1000:.1f}k tokens/s, "
                f"balance {run.history.balance[-1]:.0%}"
            )
            if run.step % interval == 0 or run.step == stop_at:
                run.history.held_out_loss.append(run.evaluate(*measured)[0])
                run.history.held_out_step.append(run.step)
                run.save(checkpoint)
    except KeyboardInterrupt:
        run.save(checkpoint)
        raise SystemExit(f"\nstopped at step {run.step}; go on with --resume {checkpoint}") from None
    finally:
        bar.close()


def report(run: Run, corpus: Corpus, options: argparse.Namespace) -> None:
    """Measures the trained model beside the bigram model, prints a sample and draws the pictures."""
    config, folder = run.config, options.out
    inputs, targets = even_windows(corpus.held_out, options.held_out // config.context, config.context)
    loss, loads = run.evaluate(inputs, targets)
    bigram = bigram_loss(corpus.train, inputs, targets)
    print(f"\nloss on {inputs.numel():,} bytes of held-out files:")
    for name, value in (("this model", loss), ("byte bigrams", bigram)):
        print(f"  {name:<13} {value:.3f} nats/byte  {value / math.log(2):.3f} bits/byte")
    print(f"  {bigram - loss:.3f} nats/byte better than bigrams" if loss < bigram else "  no better than bigrams yet")

    generator = torch.Generator().manual_seed(run.seed)
    prompt_tokens = torch.tensor(list(options.prompt.encode()), device=run.device)
    sample = run.model.generate(prompt_tokens, options.sample, temperature=0.7, generator=generator)
    text = bytes(sample.tolist()).decode(errors="replace")
    print("\na sample:\n" + "\n".join(f"  | {line}" for line in text.splitlines()))

    title = f"scattermoe: {run.preset} preset, {config.depth} layers, step {run.step}"
    plots.plot_loss(folder / "loss.png", run.history, bigram, loss, title)
    if loads:
        scattermoe.plot_expert_load(loads, title=title).savefig(folder / "expert_load.png")
    (folder / "sample.txt").write_text(text)
    print(f"\nwrote loss.png, expert_load.png, sample.txt and checkpoint.pt in {folder}")


def main() -> None:
    """Trains, measures, draws."""
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus()
    run = start(options)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    print(
        f"{corpus.train.numel() / 1e6:.1f} MB of text in {corpus.train_files} files, "
        f"{corpus.held_out.numel() / 1e6:.1f} MB in {corpus.held_out_files} held-out files\n"
        f"preset {run.preset}: {parameters / 1e6:.1f} M parameters, {options.device}, {options.dtype}"
    )
    stop_at = run.config.steps if options.stop_at is None else min(options.stop_at, run.config.steps)
    train(run, corpus, options.out / "checkpoint.pt", stop_at)
    if run.step < run.config.steps:
        print(f"stopped at step {run.step}; go on with --resume {options.out / 'checkpoint.pt'}")
    else:
        report(run, corpus, options)


if __name__ == "__main__":
    main()
