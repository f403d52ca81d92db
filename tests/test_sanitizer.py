"""Fuzzed cases once more under compute-sanitizer: no access out of bounds, no race, no misused barrier, nothing read unwritten."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer"),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_no_reports(tool: str) -> None:
    # Without PyTorch's caching allocator every tensor is an allocation of its own, with an end that can be overrun.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    fuzz = [sys.executable, "-m", "tests.fuzz", "--seed", "0", "--cases", "15", "--device", "cuda"]
    run = subprocess.run(
        [SANITIZER, "--tool", tool, *fuzz],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = run.stdout + run.stderr
    if re.search("not supported|unable to attach|Device not supported", output, re.IGNORECASE):
        pytest.skip(f"compute-sanitizer cannot run here: {output.strip().splitlines()[-1]}")
    assert run.returncode == 0, output[-3000:]
    assert "0 failed" in output
    summary = re.search(r"(ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", output)
    assert summary is not None, output[-3000:]
    assert set(summary.groups()[1:]) <= {None, "0"}, output[-3000:]
