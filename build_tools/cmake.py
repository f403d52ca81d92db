"""A setuptools command that builds extension modules with CMake."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from .torch import find_torch

ROOT = Path(__file__).resolve().parent.parent


def _program(name: str) -> str | None:
    """Returns the path of a build tool: beside this Python first, as in a virtual environment that is not activated."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def _jobs() -> str:
    """Returns how many compilers run at once: MAX_JOBS, or one a core as far as 2 GiB of memory for each allow."""
    if os.environ.get("MAX_JOBS"):
        return os.environ["MAX_JOBS"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return str(max(1, min(len(os.sched_getaffinity(0)), memory // (2 << 30))))


def _cuda_option() -> str:
    """Returns CMake's SCATTERMOE_CUDA for the environment variable of that name."""
    value = os.environ.get("SCATTERMOE_CUDA", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"SCATTERMOE_CUDA must be 0 (never build CUDA), 1 (fail without it) or unset, got {value!r}.")
    return {"": "AUTO", "0": "OFF", "1": "ON"}[value]


class CMakeExtension(Extension):
    """An extension module that CMake builds and installs into its package, with all that belongs to it."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project into the package: the built one, or in place when editable."""

    def build_extension(self, ext: CMakeExtension) -> None:
        torch = find_torch()
        cmake, ninja = _program("cmake"), _program("ninja")
        if cmake is None:
            raise SystemExit(
                f"scattermoe needs CMake 3.24 or newer: run `{sys.executable} -m pip install cmake ninja`."
            )

        # A folder for each Python and PyTorch: going back and forth between environments rebuilds nothing.
        build_dir = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.version}"
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build_dir}",
            f"-DCMAKE_INSTALL_PREFIX={ROOT / 'scattermoe'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSCATTERMOE_TORCH_DIR={torch.folder}",
            f"-DSCATTERMOE_CUDA={_cuda_option()}",
        ]
        if ninja is not None:
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        # Two builds at once in one folder would spoil each other. The lock ends with this process.
        build_dir.mkdir(parents=True, exist_ok=True)
        self._lock = open(build_dir / ".lock", "w")  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._run(*configure, *os.environ.get("CMAKE_ARGS", "").split())
        self._run(cmake, "--build", str(build_dir), "--parallel", _jobs())
        self._install = (cmake, "--install", str(build_dir))
        self._run(*self._install, "--prefix", str(Path(self.get_ext_fullpath(ext.name)).resolve().parent))

    def copy_extensions_to_source(self) -> None:
        """Installs into the source tree (CMAKE_INSTALL_PREFIX above): setuptools calls this for editable installs."""
        self._run(*self._install)

    def _run(self, *command: str) -> None:
        if subprocess.call(command) != 0:
            raise SystemExit(f"scattermoe was not built: `{' '.join(command[:3])}` failed, its output is above.")
