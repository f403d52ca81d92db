"""The benchmarks' harness: everything of it that needs no GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = "48,32,16,4,2"


@pytest.fixture(autouse=True)
def benchmark_modules(monkeypatch):
    """The benchmarks are scripts beside their modules, not a package."""
    pytest.importorskip("tqdm")
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_arguments():
    from gpu import parse_arguments
    from peers import IMPLEMENTATIONS
    from shapes import SHAPES, Shape

    everything = parse_arguments([])
    assert dict(everything.shapes) == SHAPES and len(SHAPES) == 11 and everything.impls == list(IMPLEMENTATIONS)
    some = parse_arguments(["--shapes", "mixtral", TINY, "--impls", "scattermoe", "ceiling", "--time-budget", "9"])
    assert some.shapes == [("mixtral", SHAPES["mixtral"]), (TINY, Shape(48, 32, 16, 4, 2))]
    assert some.impls == ["scattermoe", "ceiling"] and some.time_budget == 9
    for wrong in (["--shapes", "mixtrel"], ["--shapes", "8,8,8,2,3"], ["--impls", "none"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit):
            parse_arguments(wrong)


def test_routings():
    from shapes import Shape, draw_expert_ids

    shape = Shape(4096, 8, 8, 20, 4)
    counts = {}
    for routing in ("balanced", "zipf", "empty"):
        ids = draw_expert_ids(shape, routing, torch.Generator().manual_seed(0))
        assert ids.shape == (4096, 4) and all(row.unique().numel() == 4 for row in ids[:64])
        counts[routing] = ids.flatten().bincount(minlength=20).sort(descending=True).values
    assert counts["balanced"][0] < 1.2 * counts["balanced"][-1]
    assert counts["zipf"][0] > 5 * counts["zipf"][-1]
    assert (counts["empty"] == 0).sum() == 2 and counts["empty"][0] < 1.2 * counts["empty"][17]
    # Never so many empty experts that a token finds no K of them.
    assert draw_expert_ids(Shape(64, 8, 8, 2, 2), "empty", torch.Generator().manual_seed(0)).shape == (64, 2)


@pytest.mark.parametrize("broken", ["none", "output", "gates", "weight", "nan"])
def test_check_rejects_what_is_wrong(broken, tmp_path):
    from peers.ours import Layer
    from problem import Problem
    from shapes import Shape
    from worker import Server

    class Broken(Layer):
        def forward(self):
            y = super().forward()
            return {"output": y * 1.1, "nan": torch.where(y == y[3, 3], torch.nan, y)}.get(broken, y)

        def weight_gradient(self, expert):
            up, down = super().weight_gradient(expert)
            if broken == "gates":  # after the step: what the check is about to read
                self.gates.grad.neg_()
            return (up.flip(0), down) if broken == "weight" else (up, down)

    reference = str(tmp_path / "reference.pt")
    server = Server("scattermoe", "cpu")
    server.problem = Problem(Shape(32, 16, 8, 4, 2), "zipf", torch.float32, "cpu")
    server.make_reference(reference)
    server.layer = Broken(server.problem)
    assert server.check(reference)["right"] == (broken == "none")


def test_host_time_is_not_the_gpus(monkeypatch):
    from worker import Server

    server = Server("scattermoe", "cpu")
    assert server.time_on_host(lambda: time.sleep(1e-3)) > 1e3
    monkeypatch.setattr(server, "synchronize", lambda: time.sleep(5e-3))
    with pytest.raises(RuntimeError, match="lags behind the host"):
        server.time_on_host(lambda: time.sleep(1e-3))


def test_cut_search():
    pytest.importorskip("triton")
    from types import SimpleNamespace

    from peers.tuning import cut_search

    tuner = SimpleNamespace(configs=[1, 2, 3], cache_results=True, _do_bench=None)
    cut_search(tuner, lambda config: config > 1)
    assert tuner.configs == [2, 3] and tuner._do_bench.keywords["rep"] < 100 and not tuner.cache_results
    cut_search(tuner, lambda config: config > 9)
    assert tuner.configs == [2, 3]


def test_time_budget(monkeypatch):
    """Every case gets its share of the time: fewer rounds where it is short, but two."""
    import gpu

    class Worker:
        is_alive = True

        def __init__(self, name, device, peer_path):
            self.name = name

        def send(self, do, **arguments):
            self.reply = {"seconds": 0.0, "version": "1", "errors": {}, "right": True}
            if do == "time":
                time.sleep(0.2 if self.name == "grouped_mm" else 0.005)
                self.reply = {"ms": [1.0] * arguments["steps"]}

        def wait(self, timeout):
            return {} if not hasattr(self, "reply") else self.reply

        def ask(self, do, timeout, **arguments):
            self.send(do, **arguments)
            return self.wait(timeout)

        def close(self, keep_log):
            pass

    monkeypatch.setattr(gpu, "Worker", Worker)

    def rounds(*arguments):
        shapes = ["--shapes", TINY, "96,32,16,4,2", "--device", "cpu", "--steps", "3", "--rounds", "1000"]
        benchmark = gpu.Benchmark(gpu.parse_arguments([*shapes, "--uneven-impls", "scattermoe", *arguments]))
        benchmark.run()
        return [len(row["train_ms_all"]) / 3 for row in benchmark.rows if row["impl"] == "scattermoe"]

    began = time.monotonic()
    taken = rounds("--impls", "scattermoe", "ceiling", "--time-budget", "2")
    assert len(taken) == 6 and all(5 < count < 100 for count in taken), taken
    assert 1 < time.monotonic() - began < 2.5
    assert rounds("--impls", "scattermoe", "grouped_mm", "--routing", "balanced", "--time-budget", "2")[-1] == 2


def test_merge():
    """Cases come whole from the first run that measured them, host times from runs of the same shape."""
    from report import merge

    def run(shape, host, **speeds):
        rows = [
            {"shape": s, "routing": "zipf", "impl": "a", **({"train_ms": t} if t else {})} for s, t in speeds.items()
        ]
        facts = {
            "a": {"host_train_us": host, "cold_start_s": host, "cold_start_shape": "s"},
            "b": {"host_floor_us": host},
        }
        return {"environment": {"command": "c"}, "host_shape": shape, "rows": rows, "implementations": facts}

    first = run("1,2", None, s=None, t=2.0)
    first["implementations"]["a"]["cold_start_s"] = 1.0
    merged = merge([first, run("3,4", 5.0, s=6.0, t=7.0), run("1,2", 8.0)])
    assert [row["train_ms"] for row in merged["rows"]] == [6.0, 2.0]
    assert merged["implementations"]["a"]["host_train_us"] == 8.0 == merged["implementations"]["b"]["host_floor_us"]
    assert merged["implementations"]["a"]["cold_start_s"] == 8.0


def run_gpu_benchmark(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def test_run_and_page(tmp_path):
    """A run on the CPU, with an implementation that is not installed and one that cannot do what is asked."""
    pytest.importorskip("matplotlib")
    results, docs = tmp_path / "gpu.json", tmp_path / "docs"
    impls = ["scattermoe", "scattermoe-triton", "ceiling"]
    done = run_gpu_benchmark(
        "--device", "cpu", "--shapes", TINY, "--impls", *impls, "--rounds", "2", "--steps", "2", "--once-impls", "ceiling",
        "--routing", "balanced", "zipf", "--dtype", "float32", "--json", str(results), "--docs", str(docs),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(results.read_text())
    assert "not in --peer-path" in result["implementations"]["scattermoe-triton"]["reason"]
    rows = {(row["routing"], row["impl"]): row for row in result["rows"]}
    assert set(rows) == {(routing, impl) for routing in ("balanced", "zipf") for impl in ("scattermoe", "ceiling")}
    ours = rows["balanced", "scattermoe"]
    assert len(ours["train_ms_all"]) == len(ours["inference_ms_all"]) == 4
    assert len(rows["zipf", "ceiling"]["train_ms_all"]) == 2
    flops = 18 * 48 * 2 * 32 * 16
    assert ours["train_tflops"] == pytest.approx(flops / ours["train_ms"] / 1e9)
    assert ours["train_of_ceiling"] == pytest.approx(ours["train_tflops"] / rows["balanced", "ceiling"]["train_tflops"])
    facts = result["implementations"]["scattermoe"]
    for key in ("host_train", "host_train_one_thread"):
        assert facts[f"{key}_us"] > facts[f"{key.replace('train', 'floor')}_us"] > 0
    assert facts["host_train_us"] > facts["host_inference_us"] > 0
    page = (docs / "benchmarks.md").read_text()
    assert TINY in page and "## Uneven routing" in page and "scattermoe-triton on all" in page
    assert "Medians of 2, one for ceiling, shuffled rounds" in page and "| PyTorch alone |" in page
    assert (docs / "benchmarks.svg").read_text().startswith("<?xml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu", "kernels"])
def test_without_a_gpu(script, capsys):
    module = __import__(script)
    assert module.main(["--shapes", "mixtral"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "needs a CUDA GPU" in error


def test_builds(capsys, tmp_path):
    """Builds are told apart by their folders, and compared with the first."""
    import builds

    import scattermoe

    folder = Path(scattermoe.__file__).parents[1]
    small = ["--device", "cpu", "--dtype", "float32", "--shapes", "64,32,16,4,2", "--rounds", "3", "--ms", "1"]
    assert builds.main([f"one={folder}", f"other={folder}", *small]) == 0
    first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert first[:2] == ["64,32,16,4,2", "one"] and first[4:] == ["1.0000", "(1.0000", "to", "1.0000)"]
    assert second[1] == "other" and float(second[2]) > 0 and float(second[4]) > 0
    assert builds.line("s", "b", [2.0, 3.0, 8.0], [2.0, 2.0, 4.0]).split()[2:] == [
        "3.000",
        "ms",
        "1.5000",
        "(1.0000",
        "to",
        "2.0000)",
    ]

    for arguments, message in (
        ([f"one={tmp_path}"], "holds no built library"),
        (["one"], "is not NAME=FOLDER"),
        ([f"one={folder}", f"one={folder}"], "the same name"),
    ):
        with pytest.raises(SystemExit):
            builds.main([*arguments, *small])
        assert message in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert builds.main([f"one={folder}", "--device", "cuda"]) == 1
        assert "benchmarks/builds.py: process ended" in capsys.readouterr().err


def test_kernels_of_a_profile():
    """Kernels are told apart and given to products by the order of their launches."""
    import kernels
    from shapes import SHAPES

    shape = SHAPES["mixtral"]
    launches = kernels.launches_of_step(shape, "bfloat16", "sm_90")
    products = [product for launch in launches if (product := kernels.product_of(launch))]
    assert products == ["up", "down", "dO W_down", "dz W_up", "dW_down", "dW_up"]
    assert sorted(products) == sorted(kernels.PRODUCTS)
    mark = kernels.Kernel("void at::native::kernel<at::native::bitwise_not_kernel_cuda()>", 0.0, 5.0)

    def own(launch):
        return kernels.Kernel(f"void scattermoe::kernels::(anonymous namespace)::{launch.kernel}<64, true>(Args)", 0, 1)

    step = [own(launch) for launch in launches]
    step.insert(3, kernels.Kernel("Memset (Device)", 0, 0.5))
    plain = [mark, *(k for i in range(6) for k in (mark, kernels.Kernel("nvjet_gemm", 0, 100.0 * (i + 1))))]
    turns = [[kernels.Kernel("warm-up", 0, 1), mark, *step], [*plain, kernels.Kernel("splitK", 0, 6.0)], [mark, *step]]
    timeline = []
    for i, turn in enumerate(turns):  # the second step takes three times as long as the first
        for kernel in turn:
            us = kernel.us * (3 if i == 2 else 1)
            timeline.append(kernel._replace(us=us, start=timeline[-1].start + 1000 if timeline else 0.0))
    steps, bmm = kernels.deal([True, False, True], kernels.split(timeline[::-1]))
    assert list(bmm.values()) == [100, 200, 300, 400, 500, 606] and [len(step) for step in steps] == [len(step)] * 2

    rows = kernels.rows_of_case(shape, launches, steps, bmm)
    assert [row["step"] for row in rows[:-2]] == [launch.step for launch in launches]
    assert all(row["us"] == 2 for row in rows[:-2])
    by_step = {row["step"]: row for row in rows}
    up = by_step["up projection with activation"]
    assert up["tile"] == "128x256x64" and up["bmm_us"] == 100 and up["of_bmm"] == 50
    assert up["tflops"] == pytest.approx(4 * 16384 * 4096 * 14336 / 2e-6 / 1e12)
    assert by_step["other kernels"]["us"] == 1 and "bmm_us" not in by_step["sum over experts"]
    assert by_step["whole step"]["us"] == 1000 * (len(step) - 1) + 2 and by_step["whole step"]["bmm_us"] == 2106
    whole = by_step["whole step"]["us"] * 1e-6
    assert by_step["whole step"]["tflops"] == pytest.approx(3 * shape.forward_flops / whole / 1e12)
    page = kernels.page(
        {"mixtral": rows}, {"command": "python benchmarks/kernels.py", "gpu": "some"}, 2, "zipf", "bfloat16"
    )
    assert " 2 (50.00) |" in page and "- gpu: some\n" in page and "bmm    100.0 us" in kernels.line("mixtral", up)

    # The second waits until the first has ended.
    begins_early = [mark, kernels.Kernel("first", 5.0, 5.0), kernels.Kernel("second", 8.0, 6.0)]
    assert kernels.split(begins_early) == [[kernels.Kernel("first", 5.0, 5.0), kernels.Kernel("second", 10.0, 4.0)]]

    with pytest.raises(RuntimeError, match="expected the kernels"):
        kernels.rows_of_case(shape, launches, [step[:-1]], bmm)
    with pytest.raises(RuntimeError, match="expected 14 marks in the profile, got 9"):
        kernels.deal([False, False], kernels.split(timeline))


def test_cpu_benchmark(monkeypatch):
    """One small case, and that a wrong candidate stops it."""
    pytest.importorskip("transformers")
    import cpu

    # Sizes that the child processes know, in which peaks are measured, take seconds.
    monkeypatch.setitem(cpu.LAYERS, "tiny", cpu.Layer(64, 32, 4, 2))
    monkeypatch.setattr(cpu, "measure_memory_apart", lambda name, *_: 1.0 + cpu.CANDIDATES.index(name))
    case = cpu.run_case("tiny", 200, "float32", rounds=2, threads=1)
    milliseconds = {name: result["median_ms"] for name, result in case["candidates"].items()}
    faster = min(milliseconds["eager"], milliseconds["grouped_mm"])
    assert case["speedup_over_faster"] == pytest.approx(faster / milliseconds["scattermoe"], abs=1e-2)
    assert 0 < case["lowest_speedup"] <= 1.2 * case["speedup_over_faster"]
    assert case["scattermoe_gflops"] == pytest.approx(
        18 * 200 * 2 * 64 * 32 / milliseconds["scattermoe"] / 1e6, abs=0.06
    )
    page = cpu.page([case], {"command": "python benchmarks/cpu.py", "threads": 1}, 2)
    assert "| 4, 2, 64, 32 " in page and "- threads: 1\n" in page

    right = cpu.make_step
    monkeypatch.setattr(cpu, "make_step", lambda name, p: lambda: right(name, p)() * (1.01 if name == "eager" else 1))
    with pytest.raises(AssertionError, match="eager: expected a row error"):
        cpu.run_case("tiny", 200, "float32", rounds=1, threads=1)
