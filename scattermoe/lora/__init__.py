"""LoRA for experts: low-rank adapters that are computed as grouped products beside a frozen base.

Source: LoRA, https://arxiv.org/abs/2106.09685.
"""

from .adapters import Adapter, Adapters, low_ranks
from .functional import LowRank, moe_mlp, parallel_linear
from .model import (
    TARGETS,
    AdaptedModule,
    adapter_parameters,
    adapter_state_dict,
    add_adapters,
    load_adapter_state_dict,
    merge,
    remove,
    unmerge,
)

__all__ = [
    "TARGETS",
    "AdaptedModule",
    "Adapter",
    "Adapters",
    "LowRank",
    "adapter_parameters",
    "adapter_state_dict",
    "add_adapters",
    "load_adapter_state_dict",
    "low_ranks",
    "merge",
    "moe_mlp",
    "parallel_linear",
    "remove",
    "unmerge",
]
