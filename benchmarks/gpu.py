"""A SwiGLU MoE layer on one GPU: this library, its peers, and what cuBLAS makes of the same products.

    python benchmarks/gpu.py --peer-path packages/*                           # everything that is installed or in packages
    python benchmarks/gpu.py --shapes mixtral olmoe --impls scattermoe ceiling --time-budget 120
    python benchmarks/gpu.py --json benchmarks/results/gpu.json --docs docs   # also docs/benchmarks.md and its plots
    python benchmarks/gpu.py --from-json benchmarks/results/gpu.json --docs docs

Each implementation has a process of its own. For each shape and routing all of them get the same random data; their
outputs and gradients are compared with a float64 reference, and one that is wrong is not timed. Then they take turns in
shuffled rounds, the ceiling among them, so that clocks and temperature treat all alike: compare numbers of one run only.
What is timed begins with the experts' ids and gates and includes whatever an implementation does to sort them. Compilation
and tuning are over before.

An implementation that is not installed, fails, or runs out of memory is a row with its reason. Peers are looked for where
Python finds packages and, first, in the folders given by --peer-path (each like a site-packages folder);
benchmarks/install_peers.sh makes such folders. ScatterMoE's Triton package has this library's name: it must be in one.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import environment, shuffled_rounds, write_json
from peers import IMPLEMENTATIONS
from problem import TOLERANCE
from report import merge, print_row, summarize_rows, write_docs
from shapes import HOST_SHAPE, ROUTINGS, Shape, add_shapes
from worker import Worker, WorkerError

MODES = ("train", "inference")
MIN_ROUNDS = 2  # also where time is short


class OutOfTime(Exception):
    """The time budget is used up."""


class Benchmark:
    """The measuring process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + options.time_budget if options.time_budget else None
        self.rows: list[dict] = []
        self.folder = Path(tempfile.mkdtemp(prefix="benchmark-"))  # for what the workers share
        self.facts: dict[str, dict] = {name: {} for name in options.impls}
        self.workers = {name: Worker(name, options.device, options.peer_path) for name in options.impls}
        self.environment = environment()
        if options.device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            self.environment["gpu"] = properties.name
            self.environment["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
            self.environment["cuda"] = torch.version.cuda

    def time_left(self, limit: float) -> float:
        """Seconds that a request may take, at most `limit`."""
        if self.deadline is None:
            return limit
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise OutOfTime
        return min(limit, left)

    def run(self) -> None:
        """Measures all cases, as far as time allows."""
        try:
            for name, worker in list(self.workers.items()):
                self.try_to(name, lambda worker=worker: worker.wait(self.time_left(120)))
            cases = [(*shape, routing) for shape in self.options.shapes for routing in self.options.routing]
            weights = [len(self.asked(routing)) for *_, routing in cases]
            for number, case in enumerate(cases):
                # What a case leaves of its share goes to those after it.
                left = self.time_left(math.inf)
                self.run_case(*case, left * weights[number] / max(sum(weights[number:]), 1))
                self.measure_host_time()
                self.save()
        except OutOfTime:
            print(f"# the time budget of {self.options.time_budget:.0f} s is used up", flush=True)
        finally:
            for worker in self.workers.values():
                worker.close(keep_log=self.options.keep_logs)
            shutil.rmtree(self.folder)
        self.save()

    def try_to(self, name: str, action) -> dict | None:
        """The result of an action, or None with the reason kept among the implementation's facts."""
        try:
            return action()
        except WorkerError as error:
            self.facts[name]["reason"] = str(error)
            print(f"# {name}: {error}", flush=True)
            return None

    def asked(self, routing: str) -> list[str]:
        """The implementations to measure under a routing."""
        return self.options.impls if routing == "balanced" else self.options.uneven_impls

    def run_case(self, shape_name: str, shape: Shape, routing: str, seconds: float) -> None:
        """All implementations on one shape and routing; after `seconds` with fewer rounds than were asked for."""
        options = self.options
        case_deadline = time.monotonic() + seconds
        case = {"shape": shape_name, "sizes": str(shape), "routing": routing, "dtype": options.dtype}
        usable = {name: self.workers[name] for name in self.asked(routing) if "reason" not in self.facts[name]}
        rows = {name: {**case, "impl": name} for name in usable}
        times: dict[tuple[str, str], list[float]] = {(name, mode): [] for name in rows for mode in MODES}

        def fail(name: str, error: WorkerError) -> None:
            self.fail(rows[name], error)

        def running() -> list[str]:
            return [name for name, row in rows.items() if "reason" not in row]

        def ask_all(names: list[str], do: str, timeout: float, **arguments) -> dict[str, dict]:
            """At the same time: for what is not timed."""
            replies = {}
            for name in names:
                try:
                    self.workers[name].send(do, **arguments)
                except WorkerError as error:
                    fail(name, error)
            for name in [name for name in names if "reason" not in rows[name]]:
                try:
                    replies[name] = self.workers[name].wait(self.time_left(timeout))
                except WorkerError as error:
                    fail(name, error)
            return replies

        clock = [time.monotonic()]
        try:
            for name, worker in usable.items():
                if not worker.is_alive:
                    worker.start()
                    try:
                        worker.wait(self.time_left(120))
                    except WorkerError as error:
                        fail(name, error)
            sizes = [int(size) for size in str(shape).split(",")]
            ask_all(running(), "setup", 120, shape=sizes, routing=routing, dtype=options.dtype)
            reference = str(self.folder / f"{shape_name} {routing}.pt")
            for name in running():  # the first that can
                if ask_all([name], "make_reference", 120, path=reference):
                    break
            clock.append(time.monotonic())
            self.take_first_steps(running(), rows, shape_name)
            clock.append(time.monotonic())
            for name in running():  # one at a time: all their activations and gradients would not fit
                reply = ask_all([name], "check", 120, reference=reference).get(name)
                if reply is None:
                    continue
                errors = reply["errors"]
                rows[name]["errors"] = errors
                if not reply["right"]:
                    worst = max(errors, key=lambda key: (errors[key] != errors[key], errors[key]))
                    rows[name]["reason"] = (
                        f"wrong: relative error {errors[worst]:.1e} of {worst}, more than {reply['tolerance']:.0e}"
                    )
            for name in running():
                try:
                    rows[name].update(self.workers[name].ask("memory", self.time_left(120)))
                except WorkerError as error:
                    fail(name, error)
            clock.append(time.monotonic())
            pairs = [(name, mode) for name in running() for mode in MODES]
            rounds_began, rounds_done = time.monotonic(), 0
            for round_number, (name, mode) in shuffled_rounds(pairs, options.rounds):
                if round_number > rounds_done:
                    rounds_done, now = round_number, time.monotonic()
                    if rounds_done >= MIN_ROUNDS and now + (now - rounds_began) / rounds_done > case_deadline:
                        break
                if "reason" in rows[name] or (round_number > 0 and name in options.once_impls):
                    continue
                try:
                    reply = self.workers[name].ask("time", self.time_left(120), mode=mode, steps=options.steps)
                    times[name, mode] += reply["ms"]
                except WorkerError as error:
                    fail(name, error)
        finally:
            clock.append(time.monotonic())
            phases = zip(("data", "first steps", "checks", "rounds"), clock, clock[1:], strict=False)
            print(f"# {shape_name} {routing}: {', '.join(f'{p} {b - a:.1f} s' for p, a, b in phases)}", flush=True)
            for (name, mode), values in times.items():
                if values and "reason" not in rows[name]:
                    rows[name][f"{mode}_ms"] = statistics.median(values)
                    rows[name][f"{mode}_ms_all"] = [round(value, 4) for value in values]
            self.add_rows([row for name, row in rows.items() if "reason" not in self.facts[name]], shape)
            for worker in usable.values():
                if worker.is_alive and "reason" in rows[worker.name]:
                    try:
                        worker.ask("release", 30)
                    except WorkerError:
                        worker.stop()  # its state on the GPU is beyond repair: a new process takes the next shape

    def fail(self, row: dict, error: WorkerError) -> None:
        """Keeps why a row has no numbers, unless it is that there was no time."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise OutOfTime from error
        row["reason"] = str(error)

    def take_first_steps(self, names: list[str], rows: dict[str, dict], shape_name: str) -> None:
        """First steps of a case, one after the other: cold starts are to be compared, many tune their kernels on the GPU, and
        several together might not find the memory. Only what compiles for long on the host does so beside the others, once
        its cold start is known.
        """
        is_cold = {name: "version" not in self.facts[name] for name in names}
        alone = [name for name in names if is_cold[name] or not IMPLEMENTATIONS[name].compiles]
        beside = [name for name in names if name not in alone]

        def wait(name: str) -> None:
            try:
                reply = self.workers[name].wait(self.time_left(self.options.first_step_timeout))
                rows[name]["first_step_s"] = reply["seconds"]
                self.facts[name]["version"] = reply["version"]
                if is_cold[name]:
                    self.facts[name].update(cold_start_s=reply["seconds"], cold_start_shape=shape_name)
            except WorkerError as error:
                self.fail(rows[name], error)
                if is_cold[name] and str(error).startswith(("ModuleNotFoundError", "ImportError")):
                    self.facts[name]["reason"] = str(error)  # not installed: no use asking again

        def send(name: str) -> None:
            try:
                self.workers[name].send("first_step")
            except WorkerError as error:
                self.fail(rows[name], error)

        for name in beside:
            send(name)
        for name in alone:
            send(name)
            if "reason" not in rows[name]:
                wait(name)
        for name in beside:
            if "reason" not in rows[name]:
                wait(name)
        for name in names if beside else []:
            if rows[name].get("reason") == "out of memory":  # perhaps only because of what ran beside it
                del rows[name]["reason"]
                send(name)
                if "reason" not in rows[name]:
                    wait(name)

    def add_rows(self, rows: list[dict], shape: Shape) -> None:
        """Adds speeds and ratios to the rows of a case and prints them."""
        summarize_rows(rows, shape.forward_flops)
        self.rows += rows
        for row in rows:
            print_row(row)

    def measure_host_time(self) -> None:
        """Host time of a call of each implementation that has been timed and not been asked yet."""
        timed = {row["impl"] for row in self.rows if "train_ms" in row} - {"ceiling"}
        for name, worker in self.workers.items():
            if name in timed and worker.is_alive and "host_train_us" not in self.facts[name]:
                try:
                    reply = worker.ask("host", self.time_left(self.options.first_step_timeout))
                except WorkerError as error:
                    reply = {"host_train_us": None, "host_inference_us": None, "host_reason": str(error)}
                self.facts[name].update(reply)
                print(f"# {name}: {reply}", flush=True)
                self.save()

    def result(self) -> dict:
        """Everything measured so far."""
        return {
            "environment": self.environment,
            "note": self.options.note,
            "rounds": self.options.rounds,
            "steps": self.options.steps,
            "once": self.options.once_impls,
            "host_shape": str(HOST_SHAPE),
            "implementations": self.facts,
            "rows": self.rows,
        }

    def save(self) -> None:
        """Writes what there is."""
        if self.options.json:
            write_json(self.options.json, self.result())


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shapes(parser)
    parser.add_argument("--impls", nargs="+", choices=list(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument(
        "--uneven-impls", nargs="+", choices=list(IMPLEMENTATIONS), metavar="IMPL",
        help="those of --impls to measure under routings other than balanced (all)",
    )  # fmt: skip
    parser.add_argument(
        "--once-impls", nargs="+", choices=list(IMPLEMENTATIONS), default=[], metavar="IMPL",
        help="those of --impls that take part in the first round of a case only",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="bfloat16")
    parser.add_argument(
        "--rounds", type=int, default=7, help="rounds in which all implementations take turns (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a turn (%(default)s)")
    parser.add_argument(
        "--time-budget", type=float, metavar="S",
        help=f"have done after S seconds, by taking fewer rounds, but {MIN_ROUNDS}; if that is too long, write what there is",
    )  # fmt: skip
    parser.add_argument(
        "--first-step-timeout", type=float, default=900, metavar="S",
        help="give an implementation up whose first step of a shape takes longer (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--peer-path", nargs="+", default=[], metavar="DIR", help="folders with peers' packages, as in site-packages"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="also write benchmarks.md and its plots there")
    parser.add_argument(
        "--from-json", nargs="+", type=Path, metavar="FILE",
        help="measure nothing; take results from there, those of a case from the first file that has it",
    )  # fmt: skip
    parser.add_argument("--note", default="", metavar="TEXT", help="a sentence to go with the results")
    parser.add_argument(
        "--keep-logs", action="store_true", help="keep what implementations print, in the temporary folder"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.impls = list(dict.fromkeys(options.impls))
    options.uneven_impls = [name for name in options.impls if name in (options.uneven_impls or options.impls)]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit code."""
    options = parse_arguments(arguments)
    if options.from_json:
        result = merge([json.loads(path.read_text()) for path in options.from_json])
        result["note"] = " ".join(filter(None, (result["note"], options.note)))
    else:
        if options.device == "cuda" and not torch.cuda.is_available():
            print(
                "benchmarks/gpu.py needs a CUDA GPU, and PyTorch finds none here; benchmarks/cpu.py measures CPUs.",
                file=sys.stderr,
            )
            return 1
        benchmark = Benchmark(options)
        benchmark.run()
        result = benchmark.result()
    if options.docs:
        write_docs(options.docs, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
