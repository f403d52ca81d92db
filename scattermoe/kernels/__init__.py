"""Settings of the kernels, at the place where ScatterMoE keeps them."""

from . import ops

__all__ = ["ops"]
