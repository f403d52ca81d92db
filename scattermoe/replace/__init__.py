"""Existing models, changed in place: see :func:`replace_moe` and :func:`register_block`.

registry.py knows the block types, one file per family registers its own (parallel.py, fused.py, loops.py, named.py, compat.py),
trial.py tries a replacement on a copy, recast.py changes a module's class and nothing else, swap.py does all of it for a model.
"""

from . import compat, fused, loops, named, parallel  # noqa: F401  (they register what they know)
from .recast import recast
from .registry import CannotReplace, register_block
from .report import Entry, ReplaceReport
from .swap import replace_moe

__all__ = ["CannotReplace", "Entry", "ReplaceReport", "recast", "register_block", "replace_moe"]
