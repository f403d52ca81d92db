"""Drives the CMake build; everything else is said in pyproject.toml and CMakeLists.txt."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from setuptools import setup

from build_tools.cmake import CMakeBuild, CMakeExtension
from build_tools.torch import find_torch

# Before pip fetches PyTorch as a dependency, only to find after gigabytes that there was nothing to compile against.
if not {"dist_info", "bdist_wheel", "editable_wheel"}.isdisjoint(sys.argv):
    find_torch()

setup(ext_modules=[CMakeExtension("scattermoe._C")], cmdclass={"build_ext": CMakeBuild})
