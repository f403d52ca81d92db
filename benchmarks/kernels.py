"""Every kernel of a layer's step on a GPU, beside what cuBLAS takes for the same product.

    python benchmarks/kernels.py                                          # all shapes, about two minutes
    python benchmarks/kernels.py --shapes mixtral olmoe --rounds 5
    python benchmarks/kernels.py --json benchmarks/results/kernels.json --markdown docs/kernels-table.md

Times are the profiler's, of kernels in steps of forward and backward of the real layer: `scattermoe.explain` says which
products they are. Steps take turns with the same products as plain batched ones over equal groups (`torch.bmm`, the ceiling of
`benchmarks/gpu.py`), in the order of the layer; each turn comes after a pause, with a cold second-level cache.
A kernel that begins while the one before still runs is counted from that one's end.
"""

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from harness import environment, markdown_table, shuffled_rounds, write_json
from peers import ceiling, ours
from problem import TOLERANCE, Problem
from shapes import ROUTINGS, Shape, add_shapes

import scattermoe

# Product of the layer: how its step begins in `scattermoe.explain`, floating-point operations in units of 2·T·K·H·I.
PRODUCTS = {
    "up": ("up projection", 2),
    "down": ("down projection", 1),
    "dO W_down": ("gradient of hidden", 1),
    "dW_down": ("gradient of w_down", 1),
    "dz W_up": ("gradient of x", 2),
    "dW_up": ("gradient of w_up", 2),
}
# So much takes the GPU long enough that the host is ahead of it when a step begins.
FLUSH_BYTES = 2**30
MARK = (
    "bitwise_not"  # in the name of the kernel that flushes and that marks where a turn begins; nothing else launches it
)


class Kernel(NamedTuple):
    """What the profiler saw: a kernel's name, when it began and how long it took, in microseconds."""

    name: str
    start: float
    us: float


def split(kernels: list[Kernel]) -> list[list[Kernel]]:
    """The kernels between marks, in the order in which they began.

    A kernel may begin while the one before still runs, and wait: its time counts from that one's end.
    """
    parts: list[list[Kernel]] = []
    free = 0.0
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        start, end = max(kernel.start, free), kernel.start + kernel.us
        kernel, free = kernel._replace(start=start, us=max(end - start, 0.0)), max(free, end)
        if MARK in kernel.name:
            parts.append([])
        elif parts:
            parts[-1].append(kernel)
    return parts


def deal(is_step: list[bool], parts: list[list[Kernel]]) -> tuple[list[list[Kernel]], dict[str, float]]:
    """The kernels of each step, and the median microseconds of each plain product.

    Args:
        is_step: of each turn whether it is a step, which is one part, or the products, each a part after an empty one.
        parts: of the profile.
    """
    expected = sum(1 if step else 1 + len(PRODUCTS) for step in is_step)
    if len(parts) != expected:
        raise RuntimeError(f"expected {expected} marks in the profile, got {len(parts)}")
    remaining, steps = iter(parts), []
    times: dict[str, list[float]] = {product: [] for product in PRODUCTS}
    for step in is_step:
        first = next(remaining)
        if step:
            steps.append(first)
            continue
        for product in PRODUCTS:
            times[product].append(sum(kernel.us for kernel in next(remaining)))
    return steps, {product: statistics.median(values) for product, values in times.items()}


def own_name(kernel: Kernel) -> str | None:
    """The name by which `scattermoe.explain` calls a kernel of this library, None for another's."""
    name = kernel.name.replace("(anonymous namespace)::", "")
    found = re.match(r"(?:void )?scattermoe::kernels::((?:\w+::)?\w+_kernel)", name)
    return found[1] if found else None


def launches_of_step(shape: Shape, dtype: str, device: str | None = None) -> list[scattermoe.Launch]:
    """What a step of forward and backward launches, routing first."""
    sizes = {"num_tokens": shape.tokens, "num_experts": shape.num_experts, "top_k": shape.top_k}
    sizes |= {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size}
    calls = (("group_by_expert", False), ("moe_mlp", False), ("moe_mlp", True))
    return [
        launch
        for op, backward in calls
        for launch in scattermoe.explain(op, dtype=dtype, device=device, backward=backward, **sizes)
    ]


def product_of(launch: scattermoe.Launch) -> str | None:
    """The product that a launch computes, None if it multiplies no matrices."""
    begins = (name for name, (step, _) in PRODUCTS.items() if launch.step.startswith(step))
    return None if launch.tile is None else next(begins, None)


def rows_of_case(
    shape: Shape, launches: list[scattermoe.Launch], steps: list[list[Kernel]], bmm_us: dict[str, float]
) -> list[dict]:
    """The kernels of one shape, in their order, and the whole.

    Args:
        shape: of the layer.
        launches: what a step launches, by `scattermoe.explain`.
        steps: the kernels of each step that was profiled.
        bmm_us: of each of PRODUCTS, for the same number of rows.

    Returns:
        for each launch its step, kernel, tile, median microseconds, and, of a product, TFLOP/s, cuBLAS's microseconds and
        its share of the kernel's; then what is launched beside the library's kernels, and a step from its first kernel's
        beginning to its last one's end.

    Raises:
        RuntimeError: other kernels than these were launched.
    """
    expected = [launch.kernel for launch in launches]
    for step in steps:
        found = [(name, round(kernel.us, 1)) for kernel in step if (name := own_name(kernel))]
        if [name for name, _ in found] != expected:
            raise RuntimeError(f"expected the kernels {expected}, got, with microseconds, {found}")
    times = [[kernel.us for kernel in step if own_name(kernel)] for step in steps]
    unit = 2 * shape.slots * shape.hidden_size * shape.intermediate_size

    def row(step: str, us: float, units: int = 0, bmm: float | None = None, kernel: str = "", tile: str = "") -> dict:
        flops = {"tflops": units * unit / us / 1e6, "bmm_us": bmm, "of_bmm": bmm / us} if bmm else {}
        return {"step": step, "kernel": kernel, "tile": tile, "us": us, **flops}

    rows = []
    for launch, values in zip(launches, zip(*times, strict=True), strict=True):
        product, tile = product_of(launch), "x".join(map(str, launch.tile or ()))
        units, bmm = (PRODUCTS[product][1], bmm_us[product]) if product else (0, None)
        rows.append(row(launch.step, statistics.median(values), units, bmm, launch.kernel, tile))
    others = [sum(kernel.us for kernel in step if not own_name(kernel)) for step in steps]
    if any(others):
        rows.append(row("other kernels", statistics.median(others)))
    whole = statistics.median(step[-1].start + step[-1].us - step[0].start for step in steps)
    rows.append(row("whole step", whole, sum(units for _, units in PRODUCTS.values()), sum(bmm_us.values())))
    return rows


def line(shape_name: str, row: dict) -> str:
    """A row as it is printed."""
    speed = (
        f" {row['tflops']:6.1f} TFLOP/s, bmm {row['bmm_us']:8.1f} us, {row['of_bmm']:.3f} of it"
        if "bmm_us" in row
        else ""
    )
    return f"{shape_name:<13} {row['step']:<44} {row['us']:8.1f} us{speed} {row['kernel']} {row['tile']}".rstrip()


def page(cases: dict[str, list[dict]], where: dict, rounds: int, routing: str, dtype: str) -> str:
    """The Markdown page."""
    steps: dict[str, None] = {}
    for rows in cases.values():
        steps |= dict.fromkeys(row["step"] for row in rows if row["step"] != "whole step")
    cells = {
        (name, row["step"]): f"{row['us']:.0f}" + (f" ({row['of_bmm']:.2f})" if "bmm_us" in row else "")
        for name, rows in cases.items()
        for row in rows
    }
    table = [[step, *(cells.get((name, step), "") for name in cases)] for step in (*steps, "whole step")]
    facts = "\n".join(f"- {name}: {value}" for name, value in where.items() if name != "command")
    return f"""# The kernels of a layer

Written by

```
{where["command"]}
```

Microseconds of each kernel in a step of forward and backward ({dtype}, {routing} routing), and in brackets the time that cuBLAS
takes for the same product, as a plain batched one over equal groups, over it. Of the profiler, medians of {rounds} shuffled
rounds, each step after a pause and with a cold second-level cache; *whole step* from the first kernel's beginning to the last one's
end, beside the sum of cuBLAS's six. Shapes as in `benchmarks/shapes.py`.

{markdown_table(["kernel", *cases], table)}

{facts}
"""


class Case:
    """One shape on the GPU: a step of the layer, and the same products by cuBLAS."""

    def __init__(self, shape: Shape, routing: str, dtype: str) -> None:
        self.shape = shape
        self.launches = launches_of_step(shape, dtype, "cuda")
        self.problem = Problem(shape, routing, getattr(torch, dtype), "cuda")
        self.layer, self.ceiling = ours.Layer(self.problem), ceiling.Layer(self.problem)
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self.mark = torch.empty(1, dtype=torch.uint8, device="cuda")

    def step(self) -> None:
        """One part of kernels: forward and backward."""
        self.flush.bitwise_not_()
        y = self.layer.forward()
        torch.autograd.grad(y, self.layer.leaves, self.problem.grad)

    def products(self) -> None:
        """An empty part of kernels, and one for each product."""
        self.flush.bitwise_not_()
        for product in self.ceiling.products().values():
            self.mark.bitwise_not_()
            product()

    def measure(self, rounds: int, pause: float) -> list[dict]:
        """The rows of this shape."""
        turns: list[Callable[[], None]] = [self.step, self.products]
        for turn in turns:
            turn()
        torch.cuda.synchronize()
        order = []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _, turn in shuffled_rounds(turns, rounds):
                order.append(turn)
                time.sleep(pause)
                turn()
                torch.cuda.synchronize()
        seen = (event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
        parts = split([Kernel(e.name, e.time_range.start, e.time_range.elapsed_us()) for e in seen])
        steps, bmm_us = deal([turn == self.step for turn in order], parts)
        # The groups have equal numbers of rows, not always as many together as the layer.
        scale = self.shape.slots / (self.ceiling.rows * self.shape.num_experts)
        bmm_us = {product: scale * us for product, us in bmm_us.items()}
        return rows_of_case(self.shape, self.launches, steps, bmm_us)


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shapes(parser)
    parser.add_argument("--routing", choices=ROUTINGS, default="balanced")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7, help="profiled steps (%(default)s)")
    parser.add_argument("--pause", type=float, default=0.05, metavar="S", help="before each step (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write a page with a table there")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a CUDA GPU, and PyTorch finds none here.", file=sys.stderr)
        return 1
    where = {**environment(["scattermoe"]), "gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    cases: dict[str, list[dict]] = {}
    for name, shape in options.shapes:
        cases[name] = Case(shape, options.routing, options.dtype).measure(options.rounds, options.pause)
        for row in cases[name]:
            print(line(name, row), flush=True)
        torch.cuda.empty_cache()
    if options.json:
        write_json(options.json, {"environment": where, "rounds": options.rounds, "cases": cases})
    if options.markdown:
        options.markdown.write_text(page(cases, where, options.rounds, options.routing, options.dtype))
    return 0


if __name__ == "__main__":
    sys.exit(main())
