"""Forward and backward of a SwiGLU MoE layer on the CPU, beside what transformers runs there.

    python benchmarks/cpu.py                                      # everything, about ten minutes on two cores
    python benchmarks/cpu.py --layers e64 --dtypes float32        # a part of it
    python benchmarks/cpu.py --json benchmarks/results/cpu.json --markdown docs/benchmarks-cpu.md

The candidates, on the same weights, inputs and routing:
    scattermoe   scattermoe.moe_mlp, with scattermoe.route (sorting the choices) inside what is timed
    eager        transformers' loop over experts (MixtralExperts with experts_implementation="eager")
    grouped_mm   the same module with experts_implementation="grouped_mm": torch.nn.functional.grouped_mm

Before timing, outputs and all gradients (x, both weights, gates) of each candidate are compared with a loop in float64.
Times are medians over interleaved, shuffled rounds. Peak memory is measured in a process of its own for each candidate: by
how much the peak resident set during one forward and backward exceeds what was resident before it, with inputs and
weights made but no gradients, and after a first step that filled the matrix library's cache of kernels; so it counts
outputs, gradients, saved tensors and scratch memory, whoever allocates it.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import environment, interleaved_times, markdown_table, row_error, summarize, write_json
from torch import Tensor

CANDIDATES = ("scattermoe", "eager", "grouped_mm")
# The row error against float64 that a correct candidate stays under: a few roundings to the dtype.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Layer:
    """An MoE MLP: hidden size, width of one expert, experts, experts per token."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


# The ratios of Mixtral 8x7B (8 experts of 3.5 times the hidden size, 2 taken), OLMoE (64 of half, 8 taken) and Qwen3-30B-A3B
# (128 of 3/8, 8 taken) at hidden size 512, where weights and gradients of each fit a laptop and one call of the slowest
# candidate, whose time grows with the square of the number of experts, takes seconds rather than minutes.
LAYERS = {
    "e8": Layer(512, 1792, 8, 2),
    "e64": Layer(512, 256, 64, 8),
    "e128": Layer(512, 192, 128, 8),
}
TOKENS = (512, 2048)  # one short sequence; a small training batch


class Problem:
    """One layer's weights, an input with its routing, and the gradient that reaches the output."""

    def __init__(self, layer: Layer, tokens: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden, width, experts = layer.hidden_size, layer.intermediate_size, layer.num_experts

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            # Drawn in the final dtype: a temporary float32 copy would raise the peak memory before it is measured.
            return torch.empty(shape, dtype=dtype).normal_(0, scale, generator=generator)

        self.layer = layer
        self.x = random(tokens, hidden)
        self.w_up = random(experts, 2 * width, hidden, scale=hidden**-0.5)
        self.w_down = random(experts, hidden, width, scale=width**-0.5)
        gates, self.expert_ids = random(tokens, experts).float().softmax(dim=-1).topk(layer.top_k, dim=-1)
        self.gates = (gates / gates.sum(dim=-1, keepdim=True)).to(dtype)
        self.grad = random(tokens, hidden)
        for leaf in self.leaves():
            leaf.requires_grad_()

    def leaves(self) -> tuple[Tensor, ...]:
        """What gets a gradient."""
        return self.x, self.w_up, self.w_down, self.gates


def scattermoe_forward(problem: Problem) -> Callable[[], Tensor]:
    """The layer through this library."""
    import scattermoe

    def forward() -> Tensor:
        routing = scattermoe.route(problem.expert_ids, problem.layer.num_experts)
        return scattermoe.moe_mlp(problem.x, problem.w_up, problem.w_down, problem.gates, routing)

    return forward


def transformers_forward(problem: Problem, implementation: str) -> Callable[[], Tensor]:
    """The layer through transformers' experts module."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    layer = problem.layer
    config = MixtralConfig(
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size,
        num_local_experts=layer.num_experts,
        num_experts_per_tok=layer.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = MixtralExperts(config)
    del experts.gate_up_proj, experts.down_proj
    experts.gate_up_proj, experts.down_proj = problem.w_up, problem.w_down
    return lambda: experts(problem.x, problem.expert_ids, problem.gates)


def make_step(name: str, problem: Problem) -> Callable[[], Tensor]:
    """One forward and backward of candidate `name`; returns the output, leaves the gradients in `problem`."""
    forward = scattermoe_forward(problem) if name == "scattermoe" else transformers_forward(problem, name)

    def step() -> Tensor:
        for leaf in problem.leaves():
            leaf.grad = None
        y = forward()
        y.backward(problem.grad)
        return y.detach()

    return step


def exact_results(problem: Problem) -> list[Tensor]:
    """Output and gradients in float64, one expert after another; the weights' gradients are stacked once at the end."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in problem.leaves()]
    x, w_up, w_down, gates = leaves
    y = torch.zeros(x.shape, dtype=x.dtype)
    for expert, (up, down) in enumerate(zip(w_up.unbind(), w_down.unbind(), strict=True)):
        token, choice = torch.where(problem.expert_ids == expert)
        gate_rows, up_rows = F.linear(x[token], up).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate_rows) * up_rows, down)
        y = y.index_add(0, token, gates[token, choice, None] * rows)
    y.backward(problem.grad.double())
    return [y, *(leaf.grad for leaf in leaves)]


def check(problem: Problem, steps: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """The largest row error over output and gradients of each candidate, against float64."""
    reference = exact_results(problem)
    errors = {}
    for name, step in steps.items():
        results = [step(), *(leaf.grad for leaf in problem.leaves())]
        errors[name] = max(row_error(*pair) for pair in zip(results, reference, strict=True))
    return errors


def memory_in_kib(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"expected {field} in /proc/self/status")


def measure_memory(name: str, layer: Layer, tokens: int, dtype: torch.dtype) -> float:
    """MiB by which the peak resident set during one step exceeds what is resident before it, without gradients."""
    problem = Problem(layer, tokens, dtype)
    step = make_step(name, problem)
    # A first step loads libraries, starts threads and fills oneDNN's cache of compiled kernels, which later steps share.
    step()
    for leaf in problem.leaves():
        leaf.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the first step freed would hide what the second takes
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = memory_in_kib("VmRSS")
    step()
    return (memory_in_kib("VmHWM") - before) / 1024


def measure_memory_apart(name: str, layer: str, tokens: int, dtype: str, threads: int) -> float:
    """`measure_memory` in a fresh process."""
    command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", name, layer, str(tokens), dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_case(layer_name: str, tokens: int, dtype_name: str, rounds: int, threads: int) -> dict:
    """Checks, times and weighs the candidates on one layer."""
    layer, dtype = LAYERS[layer_name], getattr(torch, dtype_name)
    memory = {name: measure_memory_apart(name, layer_name, tokens, dtype_name, threads) for name in CANDIDATES}
    problem = Problem(layer, tokens, dtype)
    steps = {name: make_step(name, problem) for name in CANDIDATES}
    errors = check(problem, steps)
    for name, error in errors.items():
        if not error <= TOLERANCE[dtype_name]:
            raise AssertionError(f"{name}: expected a row error of at most {TOLERANCE[dtype_name]}, got {error}")
    times = interleaved_times(steps, rounds)
    results = {
        name: {**summarize(times[name]), "peak_mib": round(memory[name], 1), "row_error": errors[name]}
        for name in CANDIDATES
    }
    fastest_other = min(results[name]["median_ms"] for name in CANDIDATES[1:])
    round_speedups = [min(others) / ours for ours, *others in zip(*(times[name] for name in CANDIDATES), strict=True)]
    flops = 3 * 2 * 3 * tokens * layer.top_k * layer.hidden_size * layer.intermediate_size
    return {
        "layer": layer_name,
        **asdict(layer),
        "tokens": tokens,
        "dtype": dtype_name,
        "candidates": results,
        "speedup_over_faster": round(fastest_other / results["scattermoe"]["median_ms"], 3),
        "lowest_speedup": round(min(round_speedups), 3),
        "scattermoe_gflops": round(flops / results["scattermoe"]["median_ms"] / 1e6, 1),
    }


def table(cases: list[dict]) -> str:
    """The results as a Markdown table."""
    header = ["layer: E, K, H, I", "tokens", "dtype", *(f"{name} ms" for name in CANDIDATES)]
    header += ["speed-up", "lowest", "GFLOP/s", *(f"{name} MiB" for name in CANDIDATES)]
    rows = []
    for case in cases:
        results = case["candidates"]
        layer = f"{case['num_experts']}, {case['top_k']}, {case['hidden_size']}, {case['intermediate_size']}"
        speed = [f"{case[name]:.2f}" for name in ("speedup_over_faster", "lowest_speedup")]
        rows.append(
            [layer, str(case["tokens"]), case["dtype"]]
            + [f"{results[name]['median_ms']:.1f}" for name in CANDIDATES]
            + [*speed, f"{case['scattermoe_gflops']:.0f}"]
            + [f"{results[name]['peak_mib']:.0f}" for name in CANDIDATES]
        )
    return markdown_table(header, rows)


def page(cases: list[dict], where: dict, rounds: int) -> str:
    """docs/benchmarks-cpu.md."""
    facts = "\n".join(f"- {name}: {value}" for name, value in where.items() if name != "command")
    return f"""# Benchmark: one MoE layer on a CPU

Written by

```
{where["command"]}
```

{table(cases)}

Forward and backward of a SwiGLU MoE MLP, sorting of the routing included. `eager` is transformers' loop over experts,
`grouped_mm` its backend on `torch.nn.functional.grouped_mm`. Medians of {rounds} interleaved, shuffled rounds in one
process; *speed-up* is the faster of the other two over scattermoe, *lowest* the lowest in a round; GFLOP/s are scattermoe's.
MiB: by how much the peak resident set of a process of its own grows during its second forward and backward, gradients included.
Outputs and gradients of all three were compared with a float64 loop first. E experts of width I, K per token, hidden size H: the
proportions of Mixtral 8x7B, OLMoE and Qwen3-30B-A3B at hidden size 512.

{facts}
"""


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--dtypes", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each candidate (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write a page with the table there")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        name, layer, tokens, dtype = options.memory_of
        print(json.dumps(measure_memory(name, LAYERS[layer], int(tokens), getattr(torch, dtype))))
        return

    where = environment(["transformers", "scattermoe"])
    where["load average at start"] = round(os.getloadavg()[0], 2)  # other work slows threads that wait for each other
    cases = []
    for dtype in options.dtypes:
        for layer in options.layers:
            for tokens in options.tokens:
                print(f"{layer}, {tokens} tokens, {dtype} ...", file=sys.stderr, flush=True)
                cases.append(run_case(layer, tokens, dtype, options.rounds, options.threads))
    print(table(cases))
    if options.json:
        write_json(options.json, {"environment": where, "rounds": options.rounds, "cases": cases})
    if options.markdown:
        options.markdown.write_text(page(cases, where, options.rounds))


if __name__ == "__main__":
    main()
