"""Processes that work together, for tests of what is distributed."""

import time
from collections.abc import Callable
from typing import Any

from torch import multiprocessing


def run_processes(work: Callable[..., None], arguments: tuple[Any, ...], processes: int, deadline: float) -> None:
    """Run ``work(rank, *arguments)`` in new processes; an error in one is raised here.

    Processes that wait for each other are ended after ``deadline`` seconds, and that is an error, too.
    """
    running = multiprocessing.spawn(work, arguments, nprocs=processes, join=False)
    end = time.monotonic() + deadline
    try:
        while not running.join(timeout=1):
            assert time.monotonic() < end, f"the processes wait for each other after {deadline} s"
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()
