"""Sparse Mixture-of-Experts for PyTorch without moving tokens: scattered grouped GEMMs and modules on top of them."""

from . import _library

_C = _library.load()

from . import kernels, mlp, parallel_experts  # noqa: E402  (they use the operators that load() registers)
from .assignment import expert_capacity, expert_choice, limit_capacity, round_to_tiles  # noqa: E402
from .attention import MixtureOfAttention  # noqa: E402
from .cache import KVCache, StaticKVCache  # noqa: E402
from .experts import Experts, SharedExpert  # noqa: E402
from .functional import Routing, combine, moe_mlp, parallel_linear, route, topk_gating  # noqa: E402
from .launches import Launch, explain  # noqa: E402
from .load import LoadStatistics, expert_load, load_statistics, plot_expert_load  # noqa: E402
from .losses import load_balancing_loss, router_z_loss  # noqa: E402
from .megablocks import from_megablocks  # noqa: E402
from .mlp import GLUMLP, MLP  # noqa: E402
from .moe import MoE, MoEAux  # noqa: E402
from .parallel_experts import ParallelExperts, flatten_sort_count  # noqa: E402
from .replace import CannotReplace, ReplaceReport, register_block, replace_moe  # noqa: E402
from .router import TopKRouter, expert_scores, update_selection_bias  # noqa: E402

__version__: str = _C.build_info()["version"]

__all__ = [
    "GLUMLP",
    "MLP",
    "CannotReplace",
    "Experts",
    "KVCache",
    "Launch",
    "LoadStatistics",
    "MixtureOfAttention",
    "MoE",
    "MoEAux",
    "ParallelExperts",
    "ReplaceReport",
    "Routing",
    "SharedExpert",
    "StaticKVCache",
    "TopKRouter",
    "combine",
    "expert_capacity",
    "expert_choice",
    "expert_load",
    "expert_scores",
    "explain",
    "flatten_sort_count",
    "from_megablocks",
    "kernels",
    "limit_capacity",
    "load_balancing_loss",
    "load_statistics",
    "mlp",
    "moe_mlp",
    "parallel_experts",
    "parallel_linear",
    "plot_expert_load",
    "register_block",
    "replace_moe",
    "round_to_tiles",
    "route",
    "router_z_loss",
    "topk_gating",
    "update_selection_bias",
]
