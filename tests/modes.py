"""A look at which operators of the library really run."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Records (operator, arguments) of every kernel of the library that runs inside, below autograd and checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "scattermoe":
            self.seen.append((func._opname, args))
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return sum(seen == name for seen, _ in self.seen)
