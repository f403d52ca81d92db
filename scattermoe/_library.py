"""Loads the compiled operators, or says in one sentence why they cannot be loaded."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = Path(__file__).resolve().parent


def _rebuild() -> str:
    """Returns the command that builds the library again: in place where it is imported from its source tree."""
    root = _PACKAGE.parent
    if (root / "CMakeLists.txt").exists():
        return f"pip install --no-build-isolation --no-deps -e {root}"
    return "pip install --no-build-isolation --no-deps --force-reinstall . in the source tree of scattermoe"


def _minor(version: str) -> str:
    """Returns "2.11" for "2.11.0+cu130": PyTorch's C++ interface holds within a minor version."""
    return ".".join(version.split(".")[:2])


def load() -> ModuleType:
    """Registers the operators under `torch.ops.scattermoe`; a second call does nothing.

    Returns:
        The extension module `scattermoe._C`.

    Raises:
        ImportError: The library is not built, or was built for another PyTorch.

    Example:
        >>> from scattermoe import _library
        >>> _library.load().build_info()["version"]
        '0.4.0'
    """
    library = _PACKAGE / "lib" / "libscattermoe.so"
    try:
        extension = importlib.import_module("scattermoe._C")
    except ImportError as error:
        raise ImportError(
            f"scattermoe is not built for this Python (no usable scattermoe._C in {_PACKAGE}: {error}); build it: {_rebuild()}"
        ) from error
    if not library.exists():
        raise ImportError(f"scattermoe is not built (no {library}); build it: {_rebuild()}")

    built_for = extension.build_info()["torch"]
    mismatch = f"scattermoe was built for PyTorch {built_for} and this is PyTorch {torch.__version__}; rebuild it: {_rebuild()}"
    if _minor(built_for) != _minor(torch.__version__):
        raise ImportError(mismatch)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(f"{library} cannot be loaded ({error}); if PyTorch was changed since: {mismatch}") from error
    return extension
