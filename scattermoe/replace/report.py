"""What `replace_moe` did and why it left the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

__all__ = ["Entry", "ReplaceReport"]


@dataclass(frozen=True)
class Entry:
    """One module of the model.

    Attributes:
        path: its name in the model; empty for the model itself.
        block: its class before the swap.
        note: what took its place, or why it was left.
    """

    path: str
    block: str
    note: str

    def __str__(self) -> str:
        """``path (Class)``."""
        return f"{self.path or 'the model itself'} ({self.block})"


@dataclass(frozen=True)
class ReplaceReport:
    """What :func:`scattermoe.replace_moe` did; ``print`` it.

    Attributes:
        replaced: the blocks that run on scattermoe now.
        present: the modules that did so before.
        left: the blocks that could not be replaced; always empty for ``strict=True``, which raises instead.
    """

    replaced: tuple[Entry, ...] = ()
    present: tuple[Entry, ...] = ()
    left: tuple[Entry, ...] = ()

    def __str__(self) -> str:
        """One paragraph for each kind of swap and for each reason."""
        lines = _paragraphs("replaced", self.replaced)
        lines += _paragraphs("on scattermoe already", self.present)
        lines += _paragraphs("left", self.left)
        return "\n".join(lines) or "no mixture-of-experts block found"


def _paragraphs(title: str, entries: Iterable[Entry]) -> list[str]:
    lines = []
    for note, group in groupby(sorted(entries, key=lambda entry: entry.note), lambda entry: entry.note):
        members = list(group)
        lines.append(f"{title} {len(members)}: {note}")
        lines += [f"  {entry}" for entry in members[:3]]
        if len(members) > 3:
            lines.append(f"  and {len(members) - 3} more, the last {members[-1]}")
    return lines
