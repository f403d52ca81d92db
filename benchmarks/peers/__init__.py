"""The implementations that are measured, one adapter a file.

An adapter module defines ``Layer``, a class made from a :class:`problem.Problem`; it may rearrange the weights (outside
what is timed) and has

- ``forward()``: the output ``[T, H]``, everything that depends on the routing computed anew;
- ``leaves``: the tensors that get gradients: x, gates, then the weights;
- ``weight_gradient(expert)``: ``[2 * I, H]``, gate rows first, and ``[H, I]``, from the leaves' ``grad``;
- ``version()`` (static): what to print beside the name.

Each implementation runs in a process of its own: one that breaks takes no other along, two may use the same package
name, and the time from import to the end of the first step can be told.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Implementation:
    """How to run one: the adapter's module, arguments of its ``Layer``, environment variables of its process."""

    module: str
    arguments: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    is_peer: bool = True  # peers are looked for in the folders given by --peer-path
    tunes: bool = False  # times kernels on the GPU in the first step of a shape, which needs the GPU for itself


IMPLEMENTATIONS = {
    "scattermoe": Implementation("peers.ours", is_peer=False),
    "scattermoe-recompute": Implementation("peers.ours", {"recompute": True}, is_peer=False),
    "scattermoe-portable": Implementation(
        "peers.ours", environment={"SCATTERMOE_PORTABLE_KERNELS": "1"}, is_peer=False
    ),
    "sonicmoe": Implementation("peers.sonic", tunes=True),
    "megablocks-grouped": Implementation("peers.mega", {"mlp_impl": "grouped"}, tunes=True),
    "megablocks-sparse": Implementation("peers.mega", {"mlp_impl": "sparse"}, tunes=True),
    "scattermoe-triton": Implementation("peers.scattermoe_triton", tunes=True),
    "grouped_mm": Implementation("peers.torch_grouped"),
    "grouped_mm-compiled": Implementation("peers.torch_grouped", {"compiled": True}),
    "liger": Implementation("peers.liger", tunes=True),
    "ceiling": Implementation("peers.ceiling", is_peer=False),
}
