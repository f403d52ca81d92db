"""Shorter searches for implementations that time their kernels' variants at the first call of a shape."""

from collections.abc import Callable
from functools import partial
from typing import Any

import triton


def cut_search(tuner: Any, keep: Callable[[Any], bool] = lambda config: True) -> None:
    """Leaves a tuner of Triton or QuACK some of its variants, each timed for some 30 ms, in this process: what another found
    and left on disk, perhaps while others used the GPU, is not taken.

    Args:
        tuner: as the decorator made it.
        keep: whether to keep a variant; all stay where it keeps none.
    """
    tuner.configs = [config for config in tuner.configs if keep(config)] or tuner.configs
    tuner.cache_results = False
    tuner._do_bench = partial(triton.testing.do_bench, warmup=5, rep=25)
