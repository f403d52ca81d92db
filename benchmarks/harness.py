"""What every benchmark here shares: fair timing, the description of the machine, tables and result files."""

import gc
import json
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

_Name = TypeVar("_Name", bound=Hashable)


def shuffled_rounds(names: Iterable[_Name], rounds: int, seed: int = 0) -> Iterator[tuple[int, _Name]]:
    """Every name once a round, in an order shuffled anew: whatever else the machine does treats all of them alike.

    Args:
        names: of what is measured.
        rounds: how many there are.
        seed: of the shuffling.

    Yields:
        the number of the round and a name.
    """
    shuffler = random.Random(seed)
    order = list(names)
    for round_number in tqdm(range(rounds), leave=False, disable=not sys.stderr.isatty()):
        shuffler.shuffle(order)
        for name in order:
            yield round_number, name


def interleaved_times(
    candidates: dict[str, Callable[[], object]], rounds: int, seed: int = 0
) -> dict[str, list[float]]:
    """Times candidates against each other, in shuffled rounds, on a machine whose speed drifts. One untimed round comes first.

    In a round a candidate is called for half a second, or once where it takes longer, and the median call counts: a layer
    in a training loop finds caches and memory as its own last step left them, not as another candidate did.

    Args:
        candidates: what to call, by name; on a GPU a candidate must synchronise before it returns.
        rounds: how often each candidate is timed.
        seed: of the shuffling.

    Returns:
        seconds of a call in each timed round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number, name in shuffled_rounds(candidates, rounds + 1, seed):
        gc.collect()
        calls: list[float] = []
        while sum(calls) < 0.5:
            began = time.perf_counter()
            candidates[name]()
            calls.append(time.perf_counter() - began)
        if round_number > 0:
            times[name].append(statistics.median(calls))
    return times


def summarize(times: Iterable[float]) -> dict[str, float]:
    """Median, minimum and maximum of some seconds, in milliseconds."""
    milliseconds = [1e3 * value for value in times]
    return {
        "median_ms": round(statistics.median(milliseconds), 3),
        "min_ms": round(min(milliseconds), 3),
        "max_ms": round(max(milliseconds), 3),
    }


def row_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest |result - reference| of a row, over the larger of |reference| of that row and of the mean row."""
    result, reference = (value.detach().double().reshape(-1, value.shape[-1]) for value in (result, reference))
    scale = reference.norm(dim=-1)
    scale = torch.maximum(scale, scale.mean()).clamp_min(torch.finfo(torch.double).tiny)
    return ((result - reference).norm(dim=-1) / scale).max().item()


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(packages: Iterable[str] = ()) -> dict[str, str | int]:
    """Where and how a benchmark ran: command, machine, versions."""
    versions = {}
    for package in packages:
        versions[package] = __import__(package).__version__
    return {
        "command": shlex.join(["python", *sys.argv]),
        "cpu": cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
    }


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns, all but the first to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        aligned = [
            cells[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
        ]
        return "| " + " | ".join(aligned) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def write_json(path: Path, content: dict) -> None:
    """Writes a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
