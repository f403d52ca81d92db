"""What the operators allocate: no copy of the weights, no padded groups, nothing of size T x E x H."""

import time
from collections.abc import Callable

import pytest
import torch

import scattermoe
from tests.cases import make, make_ids

TOKENS, TOP_K, EXPERTS, HIDDEN, WIDTH = 256, 4, 32, 96, 64
SLOTS = TOKENS * TOP_K
SLACK = 64 * 1024  # scratch that does not grow with the tokens: offsets, a few blocks a thread


def peak(work: Callable[[], object], device: str) -> int:
    """Most bytes held at once during work(), over what was held before."""
    work()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def memory_comes_back_to(before: int) -> bool:
    """Whether the GPU's allocated memory falls to `before`; autograd's thread lets go of the last graph a moment later."""
    deadline = time.monotonic() + 5
    while torch.cuda.memory_allocated() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    return torch.cuda.memory_allocated() <= before


def tensors(
    device: str, dtype: torch.dtype, experts: int = EXPERTS
) -> tuple[dict[str, torch.Tensor], scattermoe.Routing]:
    shapes = {
        "x": (TOKENS, HIDDEN),
        "w_up": (experts, 2 * WIDTH, HIDDEN),
        "w_down": (experts, HIDDEN, WIDTH),
        "gates": (TOKENS, TOP_K),
    }
    routing = scattermoe.route(make_ids(TOKENS, TOP_K, experts, "skewed", 0).to(device), experts)
    return {n: make(s, dtype, 1, 0.1).to(device).requires_grad_() for n, s in shapes.items()}, routing


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
def test_moe_mlp_forward(device: str, dtype: torch.dtype, transposed: bool) -> None:
    t, routing = tensors(device, dtype)
    w_up, w_down = t["w_up"].detach(), t["w_down"].detach()
    if transposed:
        w_up, w_down = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (w_up, w_down))
    x, gates = t["x"].detach(), t["gates"].detach()
    b = dtype.itemsize
    # Gathered x, z, A, the rows of the down-projection, y. The weights (1.2 MB in float32) are not copied.
    bound = b * (SLOTS * (HIDDEN + 2 * WIDTH + WIDTH + HIDDEN) + TOKENS * HIDDEN) + SLACK
    with torch.no_grad():
        assert peak(lambda: scattermoe.moe_mlp(x, w_up, w_down, gates, routing), device) <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts", [TOP_K, EXPERTS], ids=["few_weights", "many_weights"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("kept", [False, True], ids=["", "kept_graph"])
def test_peak_of_a_step(device: str, dtype: torch.dtype, experts: int, recompute: bool, kept: bool) -> None:
    # The table of docs/architecture.md, in elements.
    t, routing = tensors(device, dtype, experts)
    x, w_up, w_down = t["x"].numel(), t["w_up"].numel(), t["w_down"].numel()
    z, hidden, rows = SLOTS * 2 * WIDTH, SLOTS * WIDTH, SLOTS * HIDDEN

    def work() -> object:
        y = scattermoe.moe_mlp(t["x"], t["w_up"], t["w_down"], t["gates"], routing, recompute=recompute)
        return torch.autograd.grad(y, list(t.values()), torch.ones_like(y), retain_graph=kept)

    forward = max(z + hidden + rows, z + rows + x)
    if device == "cuda":
        grad_z = z if kept and not recompute else 0
        # The rows of dx may wait for a gradient of weights, to be summed beside it: here for that of w_up where they are
        # larger, else for that of w_down, with what it is computed from.
        beside = 0 if dtype != torch.bfloat16 else w_up if rows >= w_up else hidden
        backward = z + max(hidden + grad_z + w_down, w_down + grad_z + rows + x + beside, w_down + grad_z + x + w_up)
    else:
        # All gradients are made at once, and what belongs to an expert is scratch of a thread.
        scratch = SLOTS * (2 * HIDDEN + 4 * WIDTH)
        backward = z + w_up + w_down + rows + max(x, scratch)
    assert peak(work, device) <= dtype.itemsize * max(forward, 2 * x + backward) + SLACK


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_experts_need_no_gradients_of_weights(device: str, dtype: torch.dtype) -> None:
    t, routing = tensors(device, dtype)
    for name in ("w_up", "w_down"):
        t[name].requires_grad_(False)
    b = dtype.itemsize

    def work() -> object:
        y = scattermoe.moe_mlp(t["x"], t["w_up"], t["w_down"], t["gates"], routing)
        return torch.autograd.grad(y, [t["x"], t["gates"]], torch.ones_like(y))

    bound = b * (SLOTS * (3 * HIDDEN + 7 * WIDTH) + 5 * TOKENS * HIDDEN + SLOTS) + SLACK
    assert peak(work, device) <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ["token", "grouped"])
def test_parallel_linear_forward(device: str, dtype: torch.dtype, rows: str) -> None:
    t, routing = tensors(device, dtype)
    weight = t["w_up"].detach()
    x = t["x"].detach() if rows == "token" else make((SLOTS, HIDDEN), dtype, 2).to(device)
    b = dtype.itemsize
    bound = b * SLOTS * (HIDDEN + 2 * 2 * WIDTH) + SLACK
    with torch.no_grad():
        found = peak(lambda: scattermoe.parallel_linear(x, weight, routing, grouped_in=rows == "grouped"), device)
    assert found <= bound


def test_grouped_rows_are_read_and_written_in_place(device: str) -> None:
    t, routing = tensors(device, torch.float32)
    x, weight = make((SLOTS, HIDDEN), torch.float32, 2).to(device), t["w_up"].detach()
    with torch.no_grad():
        found = peak(lambda: scattermoe.parallel_linear(x, weight, routing, grouped_in=True, grouped_out=True), device)
    assert found <= 4 * SLOTS * 2 * WIDTH + SLACK


def test_combine(device: str) -> None:
    t, routing = tensors(device, torch.bfloat16)
    rows = make((SLOTS, HIDDEN), torch.bfloat16, 2).to(device)
    with torch.no_grad():
        assert peak(lambda: scattermoe.combine(rows, t["gates"], routing), device) <= 2 * TOKENS * HIDDEN + SLACK


def test_nothing_is_kept_between_calls(device: str) -> None:
    # A leak of one gradient a step would be 1.2 MB a round.
    t, routing = tensors(device, torch.float32)

    def step() -> None:
        y = scattermoe.moe_mlp(t["x"], t["w_up"], t["w_down"], t["gates"], routing)
        torch.autograd.grad(y.sum(), list(t.values()))

    step()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        for _ in range(5):
            step()
        assert memory_comes_back_to(before)
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(5):
            step()
    assert sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]") <= SLACK
