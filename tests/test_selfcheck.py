"""`python -m scattermoe`: its report, its exit status, and that its checks can fail."""

import platform
import subprocess
import sys

import pytest
import torch

import scattermoe
from scattermoe import _C, _library, functional, selfcheck


def test_command_succeeds() -> None:
    done = subprocess.run([sys.executable, "-m", "scattermoe", "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert scattermoe.__version__ in done.stdout
    for op in selfcheck.CHECKS:
        assert op in done.stdout


@pytest.mark.parametrize("dtype", selfcheck.DTYPES)
def test_every_comparison_is_within_its_bound(dtype: torch.dtype) -> None:
    results = list(selfcheck.run("cpu", (dtype,)))
    assert {result.op for result in results} == set(selfcheck.CHECKS)
    assert not [result for result in results if not result.passed]


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.combine
    monkeypatch.setattr(functional, "combine", lambda rows, *rest: right(rows * (1 + 1e-5), *rest))
    failed = {(r.op, r.tensor) for r in selfcheck.run("cpu", (torch.float32,)) if not r.passed}
    assert failed == {("combine", "y"), ("combine", "grad rows"), ("combine", "grad gates")}


def test_a_failing_op_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(functional, "topk_gating", broken)
    failed = [r for r in selfcheck.run("cpu", (torch.float32,)) if not r.passed]
    assert [(r.op, r.problem) for r in failed] == [("topk_gating", "RuntimeError: out of order")]


def test_a_nan_is_found() -> None:
    reference = torch.ones(2, 3, dtype=torch.float64)
    actual = reference.clone()
    actual[1, 2] = torch.nan
    assert selfcheck.row_error(actual, reference) == float("inf")
    assert selfcheck.row_error(reference, reference) == 0


def test_build_info() -> None:
    info = _C.build_info()
    names = ("version", "torch", "python", "compiler", "build_type", "flags", "openmp", "cuda", "cuda_archs")
    assert tuple(info) == names
    assert info["python"].split(".")[:2] == platform.python_version().split(".")[:2]
    assert info["compiler"].split()[0] in ("GNU", "Clang") and info["build_type"] and isinstance(info["openmp"], bool)
    assert info["version"] == scattermoe.__version__
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert (info["cuda"] is None) == (info["cuda_archs"] == [])


def test_another_pytorch_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "1.13.1")
    with pytest.raises(
        ImportError, match=r"built for PyTorch 2\.\d+.* and this is PyTorch 1\.13\.1; rebuild it: pip install"
    ):
        _library.load()
