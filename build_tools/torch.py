"""Finds the PyTorch to build against."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_FIND = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"


class Torch(NamedTuple):
    folder: Path
    version: str


@lru_cache(maxsize=1)
def find_torch() -> Torch:
    """Finds the PyTorch of the environment that the library is installed into.

    pip runs an isolated build with the environment's own Python behind a search path that hides what the environment has;
    Python's option -E, which ignores PYTHONPATH, sees past that. So `pip install .` builds against the installed PyTorch too.

    Returns:
        The folder of the package `torch` and its version.

    Raises:
        SystemExit: There is none, or it is older than 2.9: one sentence that names the command to run.
    """
    for options in ([], ["-E"]):
        found = subprocess.run([sys.executable, *options, "-c", _FIND], stdout=subprocess.PIPE, text=True, cwd=os.sep)
        folder = found.stdout.strip()
        if folder and (Path(folder) / "version.py").exists():
            version = re.search(r"__version__ = '([^']+)'", (Path(folder) / "version.py").read_text())
            break
    else:
        raise SystemExit(
            "scattermoe is compiled against the PyTorch it runs with and found none: "
            "run `pip install torch setuptools cmake ninja && pip install --no-build-isolation .`"
        )
    if version is None or tuple(map(int, version[1].split(".")[:2])) < (2, 9):
        raise SystemExit(
            f"scattermoe needs PyTorch 2.9 or newer and found {version and version[1]} in {folder}: "
            "run `pip install -U torch && pip install --no-build-isolation .`"
        )
    return Torch(Path(folder), version[1])
