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
    compiles: bool = False  # for seconds on the host in the first step of a shape; others take theirs meanwhile


IMPLEMENTATIONS = {
    "scattermoe": Implementation("peers.ours", is_peer=False),
    "scattermoe-recompute": Implementation("peers.ours", {"recompute": True}, is_peer=False),
    "scattermoe-portable": Implementation(
        "peers.ours", environment={"SCATTERMOE_PORTABLE_KERNELS": "1"}, is_peer=False
    ),
    "sonicmoe": Implementation("peers.sonic"),
    "megablocks-grouped": Implementation("peers.mega", {"mlp_impl": "grouped"}),
    "megablocks-sparse": Implementation("peers.mega", {"mlp_impl": "sparse"}),
    "scattermoe-triton": Implementation("peers.scattermoe_triton"),
    "grouped_mm": Implementation("peers.torch_grouped"),
    "grouped_mm-compiled": Implementation("peers.torch_grouped", {"compiled": True}, compiles=True),
    "liger": Implementation("peers.liger"),
    "ceiling": Implementation("peers.ceiling", is_peer=False),
}
