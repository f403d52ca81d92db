"""How the matrix products round.

``ALLOW_TF32`` is read at every call of an operator through the Python functions and modules of this package:

* ``None`` (default): float32 products follow PyTorch's own setting (``torch.backends.cuda.matmul``), IEEE unless changed;
* ``True``: float32 products may run in TF32 on the GPU;
* ``False``: float32 products are IEEE, whatever PyTorch's setting says.

Other dtypes are not touched. ScatterMoE's scripts set this very variable::

    import scattermoe

    scattermoe.kernels.ops.ALLOW_TF32 = False
"""

ALLOW_TF32: bool | None = None

__all__ = ["ALLOW_TF32"]
