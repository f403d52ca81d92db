"""Devices, seeds and threads of the suite.

Every test that takes the `device` fixture runs on the CPU and, where there is one, on the GPU.
"""

import os

# Before torch: a worker of pytest-xdist shares the machine with its siblings.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import hypothesis
import pytest
import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

# The same examples in every run: a failure here is reproduced by running the test again. Fresh ones are tests/fuzz.py's job.
hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds; leave out with -m 'not slow'")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Several threads inside one operator, also in a worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(4, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled graph from an earlier test, none left for a later one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
