"""Products of float32 on the CPU run through the library's AVX-512 kernel where PyTorch says there is AVX-512, else through ATen.

PyTorch decides once a process, so each of them gets a process of its own, told by ATEN_CPU_CAPABILITY.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import scattermoe
from tests.cases import Linear, Mlp
from tests.checks import check

ROOT = Path(__file__).parent.parent
CAPABILITIES = [
    pytest.param(
        "avx512",
        marks=pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs AVX-512"),
    ),
    "avx2" if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else "default",
]
# Around the kernel's tiles of 6 rows by 64 columns or by 4, its vectors of 16 and its pieces of 512 along the contracted
# dimension. With these 150 choices, 5 skewed experts get 7 to 110 of them.
WIDTHS = (1, 3, 4, 15, 17, 64, 65, 130, 513, 1030)
FLOAT = torch.float32


def cases() -> list[Linear | Mlp]:
    linear = [
        Linear(150, 1, 5, n_in, n_out, "skewed", bias=bias, dtype=FLOAT, weight_layout=layout)
        for (n_in, n_out), bias, layout in zip(
            itertools.product(WIDTHS, WIDTHS),
            itertools.cycle([True, False, False]),
            itertools.cycle(["contiguous", "transposed", "offset", "sliced"]),
        )
        if n_in * n_out < 200_000
    ]
    rows = [Linear(tokens, 1, 1, 20, 70, "one_expert", dtype=FLOAT) for tokens in (1, 2, 3, 4, 5, 6, 121, 1100)]
    rows += [Linear(20, 1, 3, n_in, n_out, dtype=FLOAT) for n_in, n_out in ((0, 7), (7, 0))]
    other = [Linear(40, 2, 3, 33, 70, "sentinels", rows="grouped", dtype=FLOAT, x_layout="strided")]
    mlps = [Mlp(90, 2, 6, 72, 40, routing=routing, dtype=FLOAT) for routing in ("uniform", "skewed", "sentinels")]
    return linear + rows + other + mlps


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_case(capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_cpu_capability", capability]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def main(capability: str) -> None:
    """Checks every case, and by whom they were multiplied."""
    assert torch.backends.cpu.get_cpu_capability() == capability.upper()
    torch.set_num_threads(1)  # what several threads multiply together is ATen's
    for case in cases():
        check(case)

    x, weight = torch.randn(7, 20, requires_grad=True), torch.randn(3, 30, 20, requires_grad=True)
    routing = scattermoe.route(torch.arange(7) % 3, 3)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        scattermoe.parallel_linear(x, weight, routing).backward(torch.randn(7, 30))
    by_aten = sum(event.name == "aten::mm" for event in profile.events())
    assert by_aten == (0 if capability == "avx512" else 9)


if __name__ == "__main__":
    main(sys.argv[1])
