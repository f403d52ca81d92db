"""A look at which operators of the library really run, and at what they return."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Outputs(TorchDispatchMode):
    """Holds every tensor that an operator of the library returns inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func.namespace == "scattermoe":
            self.seen += outputs if isinstance(outputs, tuple) else [outputs]
        return outputs


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
