"""A seeded fuzzer over operators, shapes, routings, dtypes, memory layouts, activations and subsets of gradients.

    python -m tests.fuzz --seed 0 --cases 1000 [--device cuda]

Case i of a run is the only case of `--seed SEED+i`, so every failure is printed with a one-line reproduction.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter

import torch

from tests import reference
from tests.cases import (
    DTYPES,
    ID_DTYPES,
    LAYOUTS,
    ROUTINGS,
    WEIGHT_LAYOUTS,
    Case,
    Combine,
    Gating,
    Linear,
    Mlp,
)
from tests.checks import check

SMALL_SIZES = (1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65)
LARGE_SIZES = (96, 127, 128, 129, 160, 192, 255, 256, 320)
EXPERTS = (1, 2, 3, 4, 5, 8, 16, 60, 96, 128, 129, 512, 1025)


def subset(r: random.Random, names: tuple[str, ...]) -> tuple[str, ...]:
    """Everything half of the time, else any subset."""
    return names if r.random() < 0.5 else tuple(n for n in names if r.random() < 0.5)


def size(r: random.Random) -> int:
    return r.choice(LARGE_SIZES if r.random() < 0.2 else SMALL_SIZES)


def tokens_and_choices(r: random.Random, experts: int) -> tuple[int, int]:
    # The reference takes one slot after the other: few hundreds of slots, unlike sizes, keep a case under a second.
    top_k = r.choice((1, 1, 2, 2, 3, 4, 6, 8, experts if experts <= 16 else 10, experts + 1 if experts <= 8 else 9))
    tokens = r.choice((0, 1, 2, 3, 7, 16, 17, 33, 64, 100, 129, 200))
    return min(tokens, max(1, 400 // top_k)), top_k


def draw(seed: int, device: str) -> Case:
    """The case of a seed."""
    r = random.Random(seed)
    kind = r.choices((Linear, Combine, Mlp, Gating), (4, 1, 4, 1))[0]
    dtype = r.choice(DTYPES)
    experts = r.choice(EXPERTS)
    tokens, top_k = tokens_and_choices(r, experts)
    routing = r.choice(ROUTINGS)
    layout, other_layout, grad_layout = (r.choice(LAYOUTS) for _ in range(3))
    if kind is Linear:
        return Linear(
            tokens=tokens,
            top_k=top_k,
            experts=experts,
            n_in=size(r),
            n_out=size(r),
            routing=routing,
            rows=r.choice(("token", "slot", "grouped")),
            grouped_out=r.random() < 0.5,
            bias=r.random() < 0.5,
            dtype=dtype,
            id_dtype=r.choice(ID_DTYPES),
            flat_ids=r.random() < 0.5,
            x_layout=layout,
            weight_layout=r.choice(WEIGHT_LAYOUTS),
            grad_layout=grad_layout,
            grads=subset(r, ("x", "weight", "bias")),
            device=device,
        )
    gates = r.choice((dtype, torch.float32)) if dtype != torch.float64 else dtype
    gates_layout = other_layout if other_layout != "expanded" else "contiguous"
    if kind is Combine:
        return Combine(
            tokens=tokens,
            top_k=top_k,
            experts=experts,
            width=size(r),
            routing=routing,
            grouped=r.random() < 0.5,
            dtype=dtype,
            gates=r.choice((gates, gates, None)),
            rows_layout=layout,
            gates_layout=gates_layout,
            grad_layout=grad_layout,
            grads=subset(r, ("rows", "gates")),
            device=device,
        )
    if kind is Mlp:
        activation = r.choice(reference.ACTIVATIONS)
        return Mlp(
            tokens=tokens,
            top_k=top_k,
            experts=experts,
            hidden=size(r),
            width=size(r),
            n_out=r.choice((None, None, size(r))),
            activation=activation,
            glu_layout=r.choice(reference.GLU_LAYOUTS),
            routing=routing,
            biases=subset(r, ("b_up", "b_down")),
            dtype=dtype,
            gates=gates,
            limit=r.choice((0.5, 1.0, 7.0)),
            x_layout=layout,
            weight_layout=r.choice(WEIGHT_LAYOUTS),
            gates_layout=gates_layout,
            grad_layout=grad_layout,
            grads=subset(r, ("x", "w_up", "b_up", "w_down", "b_down", "gates")),
            recompute=r.random() < 0.25,
            device=device,
        )
    groups = r.choice([g for g in (1, 2, 3, 4, 5, 8) if experts % g == 0])
    top_groups = r.randint(1, groups)
    return Gating(
        tokens=tokens,
        experts=experts,
        k=r.randint(1, min(10, top_groups * (experts // groups))),
        scoring=r.choice(("softmax", "sigmoid")),
        normalize=r.random() < 0.5,
        selection_bias=r.random() < 0.5,
        num_groups=groups,
        top_groups=top_groups,
        scale=r.choice((1.0, 2.5)),
        dtype=dtype,
        layout=layout,
        grad_layout=grad_layout,
        device=device,
    )


def failure(seed: int, device: str) -> str | None:
    """What is wrong with the case of `seed`, and how to see it again; None if nothing is."""
    case = draw(seed, device)
    try:
        check(case)
    except Exception as error:
        what = str(error).strip().split("\n")[0]
        repeat = f"python -m tests.fuzz --seed {seed} --cases 1 --device {device}"
        return f"FAILED {repeat}  # {case!r}: {type(error).__name__}: {what}"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="the first case's seed; case i has seed SEED + i")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--show", action="store_true", help="print every case before it runs, to find one that crashes")
    options = parser.parse_args(arguments)
    failures, kinds, start = 0, Counter[str](), time.monotonic()
    for seed in range(options.seed, options.seed + options.cases):
        if options.show:
            print(seed, draw(seed, options.device), flush=True)
        kinds[type(draw(seed, options.device)).__name__] += 1
        message = failure(seed, options.device)
        if message is not None:
            failures += 1
            print(message, flush=True)
    counts = ", ".join(f"{n} {k}" for k, n in sorted(kinds.items()))
    print(
        f"{options.cases} cases ({counts}) on {options.device} in {time.monotonic() - start:.0f} s: {failures} failed"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
