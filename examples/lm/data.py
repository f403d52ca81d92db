"""Text every machine has, the Python standard library's own source, and the byte-bigram model to beat on it."""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Installed packages are not the standard library; tests are not installed everywhere; the remaining two are tables, and
# the tables in `encodings` are so alike that a held-out one would be known from its neighbours.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings"}
HELD_OUT_ONE_IN = 20
VOCABULARY = 256  # one token per byte value


class Corpus(NamedTuple):
    """Training and held-out text, each one long uint8 tensor of concatenated files."""

    train: Tensor
    held_out: Tensor
    train_files: int
    held_out_files: int


def is_held_out(relative_path: str) -> bool:
    """Decides by a hash of the file's name, so that the split depends neither on the machine nor on the file order."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def load_corpus(root: Path | None = None) -> Corpus:
    """Reads every source file of the standard library and keeps about one in twenty apart.

    Args:
        root: the folder to read `*.py` files from; the running interpreter's standard library if None.

    Raises:
        FileNotFoundError: there are too few source files under `root` to split.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    texts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py")):
        relative_path = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(relative_path.parts):
            texts[is_held_out(relative_path.as_posix())].append(path.read_bytes())
    if not texts[True] or not texts[False]:
        raise FileNotFoundError(f"expected Python source files to train on and to hold out under {root}, got none")
    train, held_out = (torch.frombuffer(bytearray(b"\n".join(texts[key])), dtype=torch.uint8) for key in (False, True))
    return Corpus(train, held_out, len(texts[False]), len(texts[True]))


def random_batch(text: Tensor, batch_size: int, length: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Draws random windows of `text`.

    The windows are a function of `(seed, step)` alone, so a resumed run sees exactly the text it would have seen.

    Returns:
        inputs and the bytes that follow them, both int64 [batch_size, length].
    """
    generator = torch.Generator().manual_seed((seed << 32) + step)
    starts = torch.randint(text.numel() - length, (batch_size,), generator=generator)
    windows = text[starts[:, None] + torch.arange(length + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def even_windows(text: Tensor, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Takes at most `count` windows spread evenly over `text`, without overlap; returns as `random_batch` does."""
    count = max(1, min(count, (text.numel() - 1) // length))
    starts = torch.arange(count) * ((text.numel() - 1) // count)
    windows = text[starts[:, None] + torch.arange(length + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def bigram_loss(train: Tensor, inputs: Tensor, targets: Tensor) -> float:
    """Mean nats per byte of a smoothed byte-bigram model counted on `train`.

    p(b | a) = (count(a, b) + m p(b)) / (count(a) + m): seldom seen contexts fall back on how frequent b is by itself.

    Args:
        train: uint8 text to count pairs of bytes on.
        inputs, targets: int64 tensors of one shape, the bytes to predict from and the bytes to predict.
    """
    m = 4.0
    pairs = train[:-1].long() * VOCABULARY + train[1:].long()
    counts = torch.bincount(pairs, minlength=VOCABULARY**2).view(VOCABULARY, VOCABULARY).double()
    frequency = torch.bincount(train.long(), minlength=VOCABULARY).double() + 1
    frequency /= frequency.sum()
    probability = (counts + m * frequency) / (counts.sum(dim=1, keepdim=True) + m)
    return -probability.log()[inputs, targets].mean().item()
