"""Rows of benchmarks/gpu.py as lines, as a page of tables, and as plots."""

import statistics
import textwrap
from pathlib import Path

from harness import markdown_table
from peers import IMPLEMENTATIONS
from shapes import ROUTINGS

MODES = {"train": 3, "inference": 1}  # cost of each in forward passes
OURS = ("scattermoe", "scattermoe-recompute", "scattermoe-portable")
PEERS = tuple(name for name in IMPLEMENTATIONS if name not in (*OURS, "ceiling"))


def summarize_rows(rows: list[dict], forward_flops: int) -> None:
    """Adds TFLOP/s and the ratio to the ceiling to the rows of one case; a row without numbers gets a reason."""
    for row in rows:
        if "reason" not in row and "train_ms" not in row:
            row["reason"] = "not reached in the time given"
        for mode, passes in MODES.items():
            if f"{mode}_ms" in row:
                row[f"{mode}_tflops"] = passes * forward_flops / row[f"{mode}_ms"] / 1e9
    ceiling = next((row for row in rows if row["impl"] == "ceiling"), {})
    for row in rows:
        for mode in MODES:
            key = f"{mode}_tflops"
            if key in row and key in ceiling:
                row[f"{mode}_of_ceiling"] = row[key] / ceiling[key]


def print_row(row: dict) -> None:
    """One line for a measured row."""
    head = f"{row['shape']:<14} {row['routing']:<9} {row['impl']:<20}"
    if "reason" in row:
        print(f"{head} {row['reason']}", flush=True)
        return
    cells = []
    for mode in MODES:
        if f"{mode}_ms" in row:
            ratio = f" {row[f'{mode}_of_ceiling']:.3f}" if f"{mode}_of_ceiling" in row else ""
            cells.append(f"{mode} {row[f'{mode}_ms']:.3f} ms {row[f'{mode}_tflops']:.1f} TFLOP/s{ratio}")
    if "peak_mib" in row:
        cells.append(f"saved {row['activation_mib']:.0f} MiB, peak {row['peak_mib']:.0f} MiB")
    cells.append(f"first step {row['first_step_s']:.1f} s")
    if row.get("errors"):
        cells.append(f"error {max(row['errors'].values()):.1e}")
    print(f"{head} {' | '.join(cells)}", flush=True)


def merge(runs: list[dict]) -> dict:
    """The results of several runs on one kind of machine as those of one.

    A case (shape and routing) comes whole from the first run that has a speed in it, so that speeds are compared within a run.
    Of cold starts the longest counts, because files that earlier runs cached shorten it.
    """
    merged = {**runs[0], "rows": [], "implementations": {}}
    merged["environment"] = dict(runs[0]["environment"])
    merged["environment"]["command"] = "\n".join(run["environment"]["command"] for run in runs)
    merged["note"] = " ".join(filter(None, (run.get("note") for run in runs)))
    cases: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        mine: dict[tuple[str, str], list[dict]] = {}
        for row in run["rows"]:
            mine.setdefault((row["shape"], row["routing"]), []).append(row)
        for case, rows in mine.items():
            if not any("train_ms" in row for row in cases.get(case, ())):
                cases[case] = rows
        for name, facts in run["implementations"].items():
            known = merged["implementations"].setdefault(name, {})
            if facts.get("cold_start_s", 0) > known.get("cold_start_s", 0):
                known.update(cold_start_s=facts["cold_start_s"], cold_start_shape=facts["cold_start_shape"])
            for key, value in facts.items():
                comparable = not key.startswith("host_") or run.get("host_shape") == runs[0].get("host_shape")
                if comparable and known.get(key) is None:
                    known[key] = value
    merged["rows"] = [row for rows in cases.values() for row in rows]
    for facts in merged["implementations"].values():
        if "version" in facts:
            facts.pop("reason", None)
    return merged


class Results:
    """Looks rows up by shape, routing and implementation."""

    def __init__(self, result: dict) -> None:
        self.result = result
        self.rows = {(row["shape"], row["routing"], row["impl"]): row for row in result["rows"]}
        self.shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
        self.routings = [name for name in ROUTINGS if any(row["routing"] == name for row in result["rows"])]
        self.impls = [
            name for name in IMPLEMENTATIONS if any(row["impl"] == name and "train_ms" in row for row in result["rows"])
        ]

    def get(self, shape: str, routing: str, impl: str, key: str) -> float | None:
        """A number, or None where there is none."""
        return self.rows.get((shape, routing, impl), {}).get(key)

    def measured(self, key: str, routing: str | None = None) -> list[str]:
        """Implementations that have a number somewhere."""
        rows = [row for row in self.result["rows"] if routing in (None, row["routing"])]
        return [name for name in self.impls if any(row["impl"] == name and key in row for row in rows)]

    def ratios(self, mode: str, impl: str, other: str, routing: str = "balanced") -> list[float]:
        """Speed of one over that of another, for each shape that both have.

        "best peer" is the fastest one of each shape; shapes where one of them has no number are left out, because it may
        be the fastest.
        """
        key, found = f"{mode}_tflops", []
        peers = [name for name in PEERS if name in self.measured(key, routing)]
        for shape in self.shapes:
            mine = self.get(shape, routing, impl, key)
            names = peers if other == "best peer" else [other]
            theirs = [value for name in names if (value := self.get(shape, routing, name, key)) is not None]
            if mine is not None and theirs and len(theirs) == len(names):
                found.append(mine / max(theirs))
        return found


def cell(value: float | None, form: str) -> str:
    """A number in a table."""
    return "" if value is None else format(value, form)


def speed_table(results: Results, mode: str, routing: str) -> str:
    """TFLOP/s by shape and implementation."""
    ours = [name for name in OURS if name in results.impls]
    header = ["shape", *results.impls, *(f"{name} / ceiling" for name in ours)]
    rows = []
    for shape in results.shapes:
        speeds = [results.get(shape, routing, name, f"{mode}_tflops") for name in results.impls]
        fastest = max(
            (s for name, s in zip(results.impls, speeds, strict=True) if s and name != "ceiling"), default=None
        )
        if fastest is None:
            continue
        cells = [f"**{s:.0f}**" if s == fastest else cell(s, ".0f") for s in speeds]
        ratios = [cell(results.get(shape, routing, name, f"{mode}_of_ceiling"), ".2f") for name in ours]
        rows.append([shape, *cells, *ratios])
    return markdown_table(header, rows)


def memory_table(results: Results, key: str) -> str:
    """MiB by shape and implementation, balanced routing."""
    routing = results.routings[0]
    impls = results.measured(key, routing)
    rows = [
        [shape, *(cell(results.get(shape, routing, name, key), ",.0f") for name in impls)]
        for shape in results.shapes
        if any(results.get(shape, routing, name, key) is not None for name in impls)
    ]
    return markdown_table(["shape", *impls], rows)


def routing_table(results: Results) -> str:
    """Speed under other routings, and its ratio to that of the same implementation under the balanced one."""
    others = [name for name in results.routings if name != "balanced"]
    impls = [name for name in results.impls if any(name in results.measured("train_tflops", one) for one in others)]
    impls = [name for name in impls if name != "ceiling"]
    rows = []
    for shape in results.shapes:
        for routing in others:
            pairs = [
                [results.get(shape, kind, name, "train_tflops") for kind in (routing, "balanced")] for name in impls
            ]
            if any(one for one, _ in pairs):
                cells = [
                    f"{cell(one, '.0f')} {f'({one / other:.2f})' if one and other else ''}".strip()
                    for one, other in pairs
                ]
                rows.append([shape, routing, *cells])
    return markdown_table(["shape", "routing", *impls], rows)


def start_table(results: Results) -> str:
    """Cold start by implementation."""
    header = ["implementation", "version", "cold start s", "on shape"]
    rows = []
    for name in results.impls:
        facts = results.result["implementations"].get(name, {})
        if name != "ceiling":
            start = cell(facts.get("cold_start_s"), ".2f")
            rows.append([name, facts.get("version", ""), start, facts.get("cold_start_shape", "")])
    return markdown_table(header, rows)


def host_table(results: Results) -> str:
    """Microseconds of the host by implementation, and of PyTorch alone."""
    rows, keys = [], ("host_train", "host_train_one_thread", "host_inference")
    for name in results.impls:
        facts = results.result["implementations"].get(name, {})
        if any(facts.get(f"{key}_us") for key in keys):
            rows.append([name, *(cell(facts.get(f"{key}_us"), ".0f") for key in keys)])
    floor = results.result["implementations"].get(OURS[0], {})
    if floor.get("host_floor_us"):
        values = [cell(floor[key], ".0f") for key in ("host_floor_us", "host_floor_one_thread_us")]
        rows.append(["PyTorch alone", *values, ""])
    return markdown_table(["µs", "step", "step, backward in the calling thread", "forward, inference mode"], rows)


def rounds_taken(results: Results) -> str:
    """How many rounds there were, in words."""
    result = results.result
    once = [name for name in result.get("once", []) if name in results.impls]
    rows = [row for row in result["rows"] if "train_ms_all" in row and row["impl"] not in once]
    counts = {len(row["train_ms_all"]) // result["steps"] for row in rows} or {result["rounds"]}
    text = str(max(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)} (as time allowed)"
    return text + (f", one for {' and '.join(once)}," if once else "")


def missing(results: Results) -> str:
    """What has no number and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, facts in results.result["implementations"].items():
        if "reason" in facts:
            reasons.setdefault((name, facts["reason"]), []).append("all")
    for row in results.result["rows"]:
        if "reason" in row:
            reasons.setdefault((row["impl"], row["reason"]), []).append(f"{row['shape']} ({row['routing']})")
    if not reasons:
        return ""
    lines = [f"- {name} on {', '.join(where)}: `{reason}`" for (name, reason), where in reasons.items()]
    return "## Not measured\n\n" + "\n".join(lines) + "\n"


def summary(results: Results) -> str:
    """Geometric means of the ratios that matter."""
    titles = {"train": "forward and backward", "inference": "forward only"}
    columns = [(impl, mode) for impl in OURS if impl in results.impls for mode in MODES]
    rows = []
    for other in ("ceiling", "best peer", *PEERS):
        cells, count = [], 0
        for impl, mode in columns:
            ratios = results.ratios(mode, impl, other)
            count = max(count, len(ratios))
            mean = f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
            cells.append(mean)
        if count:
            rows.append([f"over {other}", str(count), *cells])
    return markdown_table(["speed", "shapes", *(f"{impl}, {titles[mode]}" for impl, mode in columns)], rows)


def page(result: dict) -> str:
    """docs/benchmarks.md."""
    results = Results(result)
    where = result["environment"]
    facts = "\n".join(f"- {name}: {value}" for name, value in where.items() if name != "command")
    sizes = {row["shape"]: row["sizes"] for row in result["rows"]}
    shapes = ", ".join(f"{name} ({value})" for name, value in sizes.items())
    tables = []
    for routing in results.routings:
        for mode, title in (("train", "Forward and backward"), ("inference", "Forward only, inference mode")):
            if len(results.measured(f"{mode}_tflops", routing)) > 1:
                tables.append(f"### {title}, {routing} routing\n\n{speed_table(results, mode, routing)}\n")
    skew = ""
    if len(results.routings) > 1 and "balanced" in results.routings:
        skew = f"""## Uneven routing

TFLOP/s of forward and backward, and in brackets the ratio to the same implementation's under balanced routing.

{routing_table(results)}
"""
    host = ""
    if "host_shape" in result:
        host = f"""## Host time

What a call costs the host: microseconds until a step of (T, H, I, E, K) = ({result["host_shape"]}) returns, for all implementations.
So small a shape keeps the GPU waiting for the host (more work left on it after 20 calls than a step's would have been noticed), and is yet
one of which each takes the kernels that it has for large ones. The least of several rounds of 20 calls, after steps that compile and
tune. PyTorch runs a backward pass on a GPU in another thread, which takes time to be woken; hence also without
(`torch.autograd.set_multithreading_enabled(False)`). *PyTorch alone*: a view and its gradient, which launch nothing.

{host_table(results)}
"""
    memory = ""
    if any("peak_mib" in row for row in result["rows"]):
        memory = f"""## Memory

MiB that a forward pass leaves allocated, its output included and its input not:

{memory_table(results, "activation_mib")}

MiB by which the peak of a step of forward and backward exceeds what was allocated before it, gradients included:

{memory_table(results, "peak_mib")}
"""
    return f"""# Benchmarks: one MoE layer on a GPU

![Speed as a fraction of the ceiling](benchmarks.svg)

Written by

```
{where["command"]}
```

A SwiGLU MoE MLP in {result["rows"][0]["dtype"]}. TFLOP/s count the products of the layer, 6·T·K·H·I for the forward pass and 18·T·K·H·I with the
backward. *ceiling* is cuBLAS on the same products as plain batched ones over equal groups, with no routing, gather, activation
or sum. Shapes (T, H, I, E, K): {shapes}.

Medians of {rounds_taken(results)} shuffled rounds of {result["steps"]} steps in one run, each step with a cold second-level cache. The time
begins with experts' ids and gates and includes sorting them; compilation and tuning are over before. Each implementation runs in a process of its own
on the same random data, and its output and gradients were compared with a float64 reference first. *scattermoe-portable*
are this library's kernels for every GPU, forced; *scattermoe* is what it does by itself. Routings: *balanced* draws experts
uniformly, *zipf* with probabilities proportional to 1, 1/2, 1/3, ..., *empty* uniformly from nine tenths of them.

{textwrap.fill(result.get("note", ""), 120)}

## Summary

Geometric mean over shapes (smallest to largest). *best peer* is the fastest other implementation of each shape where all have
a number.

{summary(results)}

## TFLOP/s

{chr(10).join(tables)}
{skew}
{memory}
## First step

Cold start: from the import of the package in a process that has PyTorch and a CUDA context to the end of the first step, on
the first shape of the run; files that an implementation cached in earlier runs shorten it.

{start_table(results)}

{host}
{missing(results)}
## Where

{facts}
"""


COLORS = {
    "scattermoe": "#d1495b",
    "scattermoe-recompute": "#f4a6ae",
    "scattermoe-portable": "#edae49",
    "sonicmoe": "#00798c",
    "megablocks-grouped": "#6a4c93",
    "megablocks-sparse": "#b79ced",
    "scattermoe-triton": "#30638e",
    "grouped_mm": "#a3b18a",
    "grouped_mm-compiled": "#588157",
    "liger": "#8d99ae",
}


def plot(result: dict, path: Path) -> None:
    """One row a shape, one dot an implementation, at its fraction of the ceiling; balanced routing."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "scattermoe", "svg.fonttype": "none", "font.family": "sans-serif"})
    from matplotlib import pyplot

    results = Results(result)
    routing = results.routings[0]
    titles = {"train": "Forward and backward", "inference": "Forward only"}
    shapes = [
        shape for shape in results.shapes if any(results.get(shape, routing, name, "train_of_ceiling") for name in OURS)
    ]
    impls = [name for name in results.impls if name != "ceiling"]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 1.6 + 0.42 * max(len(shapes), 1)), sharey=True)
    for axis, (mode, title) in zip(axes, titles.items(), strict=True):
        for number, shape in enumerate(shapes):
            values = {name: results.get(shape, routing, name, f"{mode}_of_ceiling") for name in impls}
            present = [value for value in values.values() if value is not None]
            if present:
                axis.plot([min(present), max(present)], [number] * 2, color="#d9dce1", linewidth=2, zorder=1)
            for name, value in values.items():
                if value is not None:
                    ours = name in OURS
                    axis.scatter(
                        value, number, s=95 if ours else 52, color=COLORS[name], zorder=4 if ours else 3,
                        edgecolors="white", linewidths=0.8,
                    )  # fmt: skip
        axis.axvline(1, color="#444444", linewidth=1, linestyle=(0, (4, 3)), zorder=2)
        axis.set_title(title, fontsize=12, loc="left", color="#222222")
        axis.set_xlim(left=0)
        axis.set_xlabel("fraction of cuBLAS on the same products", color="#444444")
        axis.grid(axis="x", color="#eceef1", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, colors="#333333")
        for side in axis.spines.values():
            side.set_visible(False)
    axes[0].set_yticks(range(len(shapes)), shapes)
    axes[0].set_ylim(len(shapes) - 0.4, -0.6)
    handles = [
        pyplot.Line2D(
            [], [], marker="o", linestyle="", markersize=9 if name in OURS else 7, color=COLORS[name], label=name
        )
        for name in impls
    ]
    figure.legend(handles=handles, loc="lower center", ncols=min(5, max(len(handles), 1)), frameon=False)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight() * (1 + (len(handles) > 5)), 1, 1))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write_docs(folder: Path, result: dict) -> None:
    """The page and its plot."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.md").write_text(page(result))
    plot(result, folder / "benchmarks.svg")
