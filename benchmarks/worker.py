"""A process that runs one implementation and does what the measuring process asks of it, and that process's end of the line.

Requests and replies are one line of JSON each, on the worker's standard input and output; whatever the implementation
prints goes to a log.
"""

import contextlib
import gc
import importlib
import json
import os
import selectors
import site
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from peers import IMPLEMENTATIONS
from problem import TOLERANCE, Problem, Reference
from shapes import HOST_SHAPE, Shape

FLUSH_BYTES = 256 * 2**20  # several times the second-level cache of any GPU so far


class Server:
    """The worker's side: one method for each request, returning what the reply holds."""

    def __init__(self, implementation: str, device: str) -> None:
        self.implementation = IMPLEMENTATIONS[implementation]
        self.device = device
        self.adapter = self.problem = self.layer = self.flush = self.dtype = None

    # Requests.

    def setup(self, shape: list[int], routing: str, dtype: str) -> dict:
        """Makes the data of a case; frees that of the one before."""
        self.release()
        self.dtype = getattr(torch, dtype)
        self.problem = Problem(Shape(*shape), routing, self.dtype, self.device)
        self.synchronize()
        return {}

    def make_reference(self, path: str) -> dict:
        """Computes the exact results, which are the same for all, and writes them to a file."""
        torch.save(Reference(self.problem), path)
        self.give_back_memory()
        return {}

    def first_step(self) -> dict:
        """Imports the implementation (the first time), builds the layer, takes one step of forward and backward."""
        began = time.perf_counter()
        is_cold = self.adapter is None
        if is_cold:
            self.adapter = importlib.import_module(self.implementation.module)
        if self.layer is None:
            self.layer = self.adapter.Layer(self.problem, **self.implementation.arguments)
            self.problem.w_up = self.problem.w_down = None  # the layer has them, or a copy in an order of its own
        self.train_step()
        self.synchronize()
        seconds = time.perf_counter() - began
        self.give_back_memory()
        return {"seconds": seconds, "cold": is_cold, "version": self.adapter.Layer.version()}

    def check(self, reference: str) -> dict:
        """Errors of the output and of all gradients, by the exact results in a file."""
        if not self.layer.leaves:
            return {"errors": {}, "right": True}
        exact = torch.load(reference, map_location=self.device, weights_only=False)
        y = self.layer.forward()
        gradients = torch.autograd.grad(y, self.layer.leaves, self.problem.grad)
        for leaf, gradient in zip(self.layer.leaves, gradients, strict=True):
            leaf.grad = gradient
        weight_gradients = [self.layer.weight_gradient(expert) for expert in exact.experts]
        errors = exact.errors(y.detach(), *gradients[:2], weight_gradients)
        for leaf in self.layer.leaves:
            leaf.grad = None
        with torch.inference_mode():
            errors["y, inference"] = exact.error_of_output(self.layer.forward())
        del y, gradients, weight_gradients, exact
        self.give_back_memory()
        tolerance = TOLERANCE[str(self.problem.dtype).removeprefix("torch.")]
        return {"errors": errors, "right": all(error <= tolerance for error in errors.values()), "tolerance": tolerance}

    def memory(self) -> dict:
        """MiB that a forward pass leaves allocated (its output included), and by how much a step's peak exceeds what it found."""
        if self.device != "cuda" or not self.layer.leaves:
            return {}
        self.synchronize()
        before = torch.cuda.memory_allocated()
        y = self.layer.forward()
        self.synchronize()
        activation = torch.cuda.memory_allocated() - before
        del y
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.train_step()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        self.give_back_memory()
        return {"activation_mib": activation / 2**20, "peak_mib": peak / 2**20}

    def time(self, mode: str, steps: int) -> dict:
        """Milliseconds of some steps after an untimed one."""
        step = {"train": self.train_step, "inference": self.inference_step}[mode]
        step()
        milliseconds = self.time_on_gpu(step, steps) if self.device == "cuda" else self.time_on_cpu(step, steps)
        self.give_back_memory()
        return {"ms": milliseconds}

    def sustain(self, ms: float) -> dict:
        """Milliseconds of a step of training among those that follow each other for so many, after some untimed ones."""

        def run(steps: int) -> float:
            self.synchronize()
            began = time.perf_counter()
            for _ in range(steps):
                self.train_step()
            self.synchronize()
            return 1e3 * (time.perf_counter() - began) / steps

        steps = max(round(ms / run(2)), 2)
        return {"ms": run(steps)}

    def host(self) -> dict:
        """Microseconds of the host in a step whose work on the GPU is next to nothing, and in PyTorch's least step."""
        kept = self.problem, self.layer
        self.problem = Problem(HOST_SHAPE, "balanced", self.dtype, self.device)
        try:
            self.layer = self.adapter.Layer(self.problem, **self.implementation.arguments)
            times = {}
            for key, step in (
                ("train", self.train_step),
                ("inference", self.inference_step),
                ("floor", self.view_step),
            ):
                times[f"host_{key}_us"] = self.time_on_host(step)
                if key != "inference":
                    # Otherwise backward runs in a thread of the device, which has to be woken, and to wake this one.
                    with torch.autograd.set_multithreading_enabled(False):
                        times[f"host_{key}_one_thread_us"] = self.time_on_host(step)
        finally:
            self.problem, self.layer = kept
        return times

    def release(self) -> dict:
        """Frees everything."""
        self.problem = self.layer = None
        gc.collect()
        self.give_back_memory(share=1)
        return {}

    # What the requests are made of.

    def train_step(self) -> None:
        """Forward and backward."""
        if hasattr(self.layer, "backward"):
            self.layer.forward()
            self.layer.backward()
            return
        y = self.layer.forward()
        torch.autograd.grad(y, self.layer.leaves, self.problem.grad)

    def inference_step(self) -> None:
        """Forward alone, in inference mode."""
        with torch.inference_mode():
            self.layer.forward()

    def view_step(self) -> None:
        """Forward and backward of a view, which launch nothing: what PyTorch takes for a step of anything."""
        x = self.layer.leaves[0]
        torch.autograd.grad(x.view_as(x), x, self.problem.grad)

    def time_on_host(self, step: Callable[[], None], calls: int = 20) -> float:
        """Microseconds until a call of a step returns: the least of the rounds of calls that 0.2 s hold, but three.

        Raises:
            RuntimeError: the GPU lags behind, so that the host may have had to wait for it.
        """
        for _ in range(5):
            step()
        times: list[tuple[float, float]] = []
        while len(times) < 3 or sum(seconds for seconds, _ in times) * calls < 0.2:
            self.synchronize()
            began = time.perf_counter()
            for _ in range(calls):
                step()
            returned = time.perf_counter()
            self.synchronize()
            times.append(((returned - began) / calls, time.perf_counter() - returned))
        seconds, lag = min(times)
        if lag > seconds + 50e-6:  # more work was left than the last step's
            raise RuntimeError(f"the GPU lags behind the host by {1e6 * lag:.0f} us after {calls} calls")
        return 1e6 * seconds

    def time_on_gpu(self, step: Callable[[], None], steps: int) -> list[float]:
        """By events, each step with a cold second-level cache."""
        if self.flush is None:
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(steps)]
        for began, ended in events:
            self.flush.zero_()
            began.record()
            step()
            ended.record()
        self.synchronize()
        return [began.elapsed_time(ended) for began, ended in events]

    def time_on_cpu(self, step: Callable[[], None], steps: int) -> list[float]:
        """By the clock."""
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - began))
        return times

    def synchronize(self) -> None:
        """Waits for the GPU."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def give_back_memory(self, share: float = 0.5) -> None:
        """Lets the other processes have what this one does not use, if less than a share of the GPU's memory is free."""
        if self.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            if free < share * total:
                torch.cuda.empty_cache()


def reason_of(error: BaseException) -> str:
    """One line that tells a reader why a row has no number."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def serve(implementation: str, device: str) -> None:
    """Answers requests until there are no more."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = Server(implementation, device)
    if device == "cuda":
        torch.cuda.init()
        torch.empty(1, device=device)
    print(json.dumps({}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(server, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": reason_of(error)}
            error.__traceback__ = None  # it holds tensors
        print(json.dumps(reply), file=replies, flush=True)


class WorkerError(Exception):
    """An implementation could not do what was asked; the message is the reason."""


class Worker:
    """The measuring process's side of a worker, which is started at once and can be started anew after a crash."""

    def __init__(self, name: str, device: str, peer_path: list[str], environment: dict[str, str] | None = None) -> None:
        self.name, self.device, self.peer_path = name, device, peer_path
        self.environment = environment or {}
        self.process: subprocess.Popen | None = None
        self.log = tempfile.NamedTemporaryFile("w+", prefix=f"{name}-", suffix=".log", delete=False)  # noqa: SIM115
        self.pending = b""
        self.start()

    def start(self) -> None:
        """Starts the process; `wait` for its first reply."""
        command = [sys.executable, str(Path(__file__).resolve()), self.name, self.device]
        implementation = IMPLEMENTATIONS[self.name]
        if implementation.is_peer:
            command += self.peer_path
        environment = {**os.environ, **implementation.environment, **self.environment}
        self.pending = b""
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment
        )

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self.process is not None and self.process.poll() is None

    def send(self, do: str, **arguments) -> None:
        """Asks; the reply is to be waited for."""
        if not self.is_alive:
            raise WorkerError(self.last_words())
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self.process.stdin.flush()

    def wait(self, timeout: float) -> dict:
        """The reply; a process that does not answer in time is ended."""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.pending:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self.stop()
                    raise WorkerError(f"no answer in {timeout:.0f} s")
                chunk = os.read(self.process.stdout.fileno(), 65536)
                if not chunk:
                    self.process.wait()
                    raise WorkerError(self.last_words())
                self.pending += chunk
        line, self.pending = self.pending.split(b"\n", 1)
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def ask(self, do: str, timeout: float, **arguments) -> dict:
        """Asks and waits."""
        self.send(do, **arguments)
        return self.wait(timeout)

    def last_words(self) -> str:
        """Why the process ended, as far as its log tells."""
        with open(self.log.name) as log:
            lines = [line.strip() for line in log if line.strip()]
        code = self.process.poll() if self.process else None
        return f"process ended with code {code}: {lines[-1] if lines else 'no message'}"[:200]

    def stop(self) -> None:
        """Ends the process."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def close(self, keep_log: bool = False) -> None:
        """Ends the process for good."""
        self.stop()
        self.log.close()
        if not keep_log:
            os.unlink(self.log.name)


if __name__ == "__main__":
    for folder in reversed(sys.argv[3:]):
        # Also follows .pth files, and comes before what is installed: a package there may have the name of one here.
        known = set(sys.path)
        site.addsitedir(folder)
        added = [entry for entry in sys.path if entry not in known]
        sys.path[:] = added + [entry for entry in sys.path if entry in known]
        # For the processes that a peer starts to compile its kernels.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*added, os.environ.get("PYTHONPATH")]))
    serve(sys.argv[1], sys.argv[2])
