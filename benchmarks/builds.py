"""Builds of this library against each other.

    python benchmarks/builds.py before=../before after=.                    # checkouts, each built in place
    python benchmarks/builds.py before=../before after=. --shapes mixtral granite-3b --rounds 20
    python benchmarks/builds.py before=../before after=. --device cpu --shapes 512,256,128,8,2

Steps of forward and backward follow each other as a training run has them, `--ms` of them at a time: a GPU that is at its
power limit then is slower than one that rests between two measurements, and what helps the one need not help the other. Builds
take turns, each in a process of its own, in rounds that are shuffled anew; what is printed is a build's milliseconds and, over
those of the first one in the same round, the median and the quartiles.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from harness import shuffled_rounds
from problem import TOLERANCE
from shapes import ROUTINGS, Shape, add_shapes
from worker import Worker, WorkerError

TIMEOUT = 300.0  # seconds for one request


def parse_build(text: str) -> tuple[str, Path]:
    """A build by NAME=FOLDER."""
    name, separator, folder = text.partition("=")
    package = Path(folder).resolve() / "scattermoe"
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    if not any(package.glob("_C*")):
        raise argparse.ArgumentTypeError(f"{package} holds no built library")
    return name, package.parent


def compare(workers: dict[str, Worker], shape: Shape, options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of a step in each round, by build."""
    for worker in workers.values():
        worker.ask("setup", TIMEOUT, shape=list(vars(shape).values()), routing=options.routing, dtype=options.dtype)
        worker.ask("first_step", TIMEOUT)
    times: dict[str, list[float]] = {name: [] for name in workers}
    for round_number, name in shuffled_rounds(workers, options.rounds + 1):
        reply = workers[name].ask("sustain", TIMEOUT, ms=options.ms)
        if round_number > 0:
            times[name].append(reply["ms"])
    for worker in workers.values():
        worker.ask("release", TIMEOUT)
    return times


def line(shape_name: str, name: str, times: list[float], first: list[float]) -> str:
    """A build as it is printed."""
    ratios = [a / b for a, b in zip(times, first, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{shape_name:<14} {name:<16} {statistics.median(times):10.3f} ms {middle:7.4f} ({low:.4f} to {high:.4f})"


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "builds", nargs="+", type=parse_build, metavar="NAME=FOLDER", help="the first is what others are compared with"
    )
    add_shapes(parser)
    parser.add_argument("--routing", choices=ROUTINGS, default="balanced")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each build (%(default)s)")
    parser.add_argument("--ms", type=float, default=60.0, help="milliseconds of steps in a turn (%(default)s)")
    options = parser.parse_args(arguments)
    builds = dict(options.builds)
    if len(builds) < len(options.builds):
        parser.error("two builds have the same name")
    workers = {
        name: Worker("scattermoe", options.device, [], {"PYTHONPATH": str(folder)}) for name, folder in builds.items()
    }
    try:
        for worker in workers.values():
            worker.wait(TIMEOUT)
        for shape_name, shape in options.shapes:
            times = compare(workers, shape, options)
            for name, values in times.items():
                print(line(shape_name, name, values, next(iter(times.values()))), flush=True)
    except WorkerError as error:
        print(f"benchmarks/builds.py: {error}", file=sys.stderr)
        return 1
    finally:
        for worker in workers.values():
            worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
