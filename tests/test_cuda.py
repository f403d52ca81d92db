"""What only a GPU can get wrong: host syncs, streams, graphs, devices, memory nobody wrote, 64-bit indices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import scattermoe
from tests import reference
from tests.cases import ROUTINGS, Combine, Gating, Linear, Mlp, make, make_ids, mlp_tensors, to_device
from tests.checks import check
from tests.test_memory import memory_comes_back_to
from tests.tolerances import bound, row_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = "cuda"
TOKENS, TOP_K, EXPERTS = 192, 4, 12
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Layer:
    """Every operator in one differentiable function of static tensors: gating, routing, fused and composed experts."""

    def __init__(
        self, dtype: torch.dtype, device: str = CUDA, hidden: int = 72, width: int = 40, seed: int = 1
    ) -> None:
        case = Mlp(tokens=TOKENS, top_k=TOP_K, experts=EXPERTS, hidden=hidden, width=width, dtype=dtype)
        tensors = mlp_tensors(case, seed)
        self.inputs = {n: to_device(t, device).detach().requires_grad_() for n, t in tensors.items()}
        self.logits = make((TOKENS, EXPERTS), torch.float32, seed + 20).to(device).requires_grad_()
        self.ids = make_ids(TOKENS, TOP_K, EXPERTS, "sentinels", seed).to(device)
        self.grad = make((TOKENS, hidden), dtype, seed + 21).to(device)
        self.leaves = [*self.inputs.values(), self.logits]

    def forward(self, ids: Tensor | None = None) -> Tensor:
        t = self.inputs
        routing = scattermoe.route(self.ids if ids is None else ids, EXPERTS)
        y = scattermoe.moe_mlp(
            t["x"], t["w_up"], t["w_down"], t["gates"], routing, up_bias=t["b_up"], down_bias=t["b_down"]
        )
        gates, chosen = scattermoe.topk_gating(self.logits, TOP_K, normalize=True)
        routing = scattermoe.route(chosen, EXPERTS)
        z = scattermoe.parallel_linear(t["x"], t["w_up"], routing, bias=t["b_up"], grouped_out=True)
        half = z.size(1) // 2
        rows = scattermoe.parallel_linear(z[:, :half], t["w_down"], routing, bias=t["b_down"], grouped_in=True)
        return y + scattermoe.combine(rows, gates, routing, grouped=False)

    def step(self, ids: Tensor | None = None) -> list[Tensor]:
        y = self.forward(ids)
        return [y, *torch.autograd.grad(y, self.leaves, self.grad)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_host_sync(dtype: torch.dtype) -> None:
    layer = Layer(dtype)
    layer.step()
    torch.cuda.synchronize()
    with no_sync():
        layer.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_replays_with_other_routing(dtype: torch.dtype) -> None:
    layer = Layer(dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.step()
    for number, routing in enumerate(ROUTINGS):
        layer.ids.copy_(make_ids(TOKENS, TOP_K, EXPERTS, routing, number).to(CUDA))
        with torch.no_grad():
            layer.logits.copy_(torch.randn(TOKENS, EXPERTS, device=CUDA))
            if number % 2:
                # All tokens to the same few experts: most groups are empty.
                layer.logits[:, TOP_K:] = -100
            layer.inputs["x"].copy_(torch.randn_like(layer.inputs["x"]))
        graph.replay()
        replayed = [t.clone() for t in captured]
        assert_same(replayed, layer.step())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_current_stream_is_honoured(dtype: torch.dtype) -> None:
    layer = Layer(dtype)
    expected = layer.step()
    x = layer.inputs["x"]
    right = x.detach().clone()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        # The input only becomes right after a long wait on this stream: work on any other stream would read NaN.
        x.fill_(float("nan"))
        torch.cuda._sleep(100_000_000)
        x.copy_(right)
    with torch.cuda.stream(stream):
        found = layer.step()
    stream.synchronize()
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_without_a_context(dtype: torch.dtype) -> None:
    """The first CUDA call of a thread may be a launch of ours, where its memory comes from the allocator's cache."""
    x, weight = make((512, 64), dtype, 1).to(CUDA), make((2, 64, 64), dtype, 2).to(CUDA)
    routing = scattermoe.route(make_ids(512, 1, 2, "uniform", 3).to(CUDA), 2)
    expected = scattermoe.parallel_linear(x, weight, routing)
    scattermoe.parallel_linear(x, weight, routing)  # leaves its output in the cache
    with ThreadPoolExecutor(1) as fresh:
        result = fresh.submit(torch.inference_mode()(scattermoe.parallel_linear), x, weight, routing).result()
    assert torch.equal(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_of_the_tensors_is_honoured() -> None:
    first, second = Layer(torch.bfloat16, "cuda:0"), Layer(torch.bfloat16, "cuda:1")
    expected = first.step()
    with torch.cuda.device(0):
        found = second.step()
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in found)
    assert_same([t.to("cuda:0") for t in found], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_two_devices_are_refused() -> None:
    routing = scattermoe.route(torch.zeros(4, 1, dtype=torch.int64, device="cuda:0"), 1)
    x, weight = torch.ones(4, 8, device="cuda:1"), torch.ones(1, 8, 8, device="cuda:0")
    with pytest.raises((RuntimeError, ValueError), match=r"device.*cuda:[01].*cuda:[01]"):
        scattermoe.parallel_linear(x, weight, routing)


def test_cpu_tensors_beside_cuda_tensors_are_refused() -> None:
    routing = scattermoe.route(torch.zeros(4, 1, dtype=torch.int64, device=CUDA), 1)
    x, weight = torch.ones(4, 8, device=CUDA), torch.ones(1, 8, 8)
    with pytest.raises((RuntimeError, ValueError), match=r"weight.*device.*(cpu.*cuda|cuda.*cpu)"):
        scattermoe.parallel_linear(x, weight, routing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable_under_load(dtype: torch.dtype) -> None:
    layer = Layer(dtype)
    expected = layer.step()
    other = torch.cuda.Stream()
    a = torch.randn(2048, 2048, device=CUDA)
    for _ in range(10):
        with torch.cuda.stream(other):
            for _ in range(4):
                a = (a @ a).clamp_(-1, 1)
        assert_same(layer.step(), expected)
    torch.cuda.synchronize()


@contextmanager
def poisoned_memory() -> Iterator[Callable[[], None]]:
    """The caching allocator hands out blocks full of NaN (0xFF bytes) for as long as poison() is called before each use."""

    def poison() -> None:
        blocks = []
        for megabytes in (1, 1, 1, 1, 2, 4, 8, 16, 32, 64, 128):
            blocks += [torch.full((megabytes << 20,), 255, dtype=torch.uint8, device=CUDA) for _ in range(4)]
        # Small requests come from pools of their own: 512 bytes to 1 MB.
        for power in range(9, 20):
            blocks += [torch.full((1 << power,), 255, dtype=torch.uint8, device=CUDA) for _ in range(24)]
        del blocks

    torch.cuda.empty_cache()
    yield poison
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ["uniform", "one_expert", "sentinels", "all_sentinels"])
@pytest.mark.parametrize("sizes", [(72, 40), (64, 128), (33, 17)], ids=str)
def test_every_element_is_written(dtype: torch.dtype, routing: str, sizes: tuple[int, int]) -> None:
    layer = Layer(dtype, hidden=sizes[0], width=sizes[1])
    layer.ids.copy_(make_ids(TOKENS, TOP_K, EXPERTS, routing, 3).to(CUDA))
    expected = layer.step()
    with poisoned_memory() as poison:
        for _ in range(3):
            poison()
            found = layer.step()
            assert all(bool(t.isfinite().all()) for t in found)
            assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 6, 7, 8, 10, 16])
@pytest.mark.parametrize("routing", ["skewed", "sentinels"])
@pytest.mark.parametrize("width", [8, 512, 4608])
def test_sum_beside_a_gradient_of_weights(dtype: torch.dtype, top_k: int, routing: str, width: int) -> None:
    # Hopper sums the rows of dx while it computes the gradient of w_up (width 8) or of w_down, or after it (width 4608).
    experts, tokens, hidden = 16, 640 // top_k + 33, 8 * (3 + top_k * (top_k if width < 4096 else 1))
    x, grad = make((tokens, hidden), dtype, 1).to(CUDA), make((tokens, hidden), dtype, 2).to(CUDA)
    w_up = make((experts, 2 * width, hidden), dtype, 3).to(CUDA)
    w_down = make((experts, hidden, width), dtype, 4).to(CUDA)
    z, gates = make((tokens * top_k, 2 * width), dtype, 5).to(CUDA), torch.rand(tokens, top_k, device=CUDA)
    r = scattermoe.route(make_ids(tokens, top_k, experts, routing, 6).to(CUDA), experts)
    tensors = (grad, x, w_up, w_down, None, gates, z, r.slot_order, r.slot_position, r.expert_offsets)

    def gradients(of_x: bool, of_weights: bool) -> list[Tensor]:
        mask = [of_x, of_weights, False, of_weights, False, False]
        of = torch.ops.scattermoe._moe_mlp_backward(*tensors, "swiglu", "gate_up", 1.0, 1.0, None, mask)
        return [of[0], of[1], of[3]]

    expected = [gradients(True, False)[0], *gradients(False, True)[1:]]
    with poisoned_memory() as poison:
        poison()
        found = gradients(True, True)
    assert all(bool(t.isfinite().all()) for t in found)
    assert_same(found, expected)


def test_every_index_is_written() -> None:
    ids = make_ids(1000, 3, 60, "sentinels", 0).to(CUDA)
    expected = [t.clone() for t in scattermoe.route(ids, 60)]
    with poisoned_memory() as poison:
        for _ in range(3):
            poison()
            assert_same(list(scattermoe.route(ids, 60)), expected)


# Tiles of the kernels end somewhere: sizes on both sides of every multiple that a tile may have.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "n_in, n_out", [(64, 64), (128, 256), (256, 192), (72, 200), (136, 130), (100, 97), (257, 8), (8, 257)]
)
@pytest.mark.parametrize("weight_layout", ["contiguous", "transposed"])
def test_tiles(dtype: torch.dtype, n_in: int, n_out: int, weight_layout: str) -> None:
    for rows, routing in (("token", "skewed"), ("grouped", "sentinels"), ("slot", "few_experts")):
        case = Linear(tokens=150, top_k=2, experts=4, n_in=n_in, n_out=n_out, dtype=dtype, device=CUDA)
        check(Linear(**(vars(case) | {"rows": rows, "routing": routing, "weight_layout": weight_layout})))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden, width", [(128, 64), (256, 192), (200, 72), (130, 97)])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_tiles_of_the_fused_mlp(dtype: torch.dtype, hidden: int, width: int, activation: str) -> None:
    for glu_layout in reference.GLU_LAYOUTS if activation in reference.GATED else ("gate_up",):
        check(
            Mlp(
                tokens=140,
                experts=3,
                hidden=hidden,
                width=width,
                activation=activation,
                glu_layout=glu_layout,
                routing="skewed",
                dtype=dtype,
                device=CUDA,
            )
        )


# A block goes from tile to tile, and stores one between the products of the next, which may have fewer than that takes.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden, width", [(64, 192), (256, 640), (520, 136), (1024, 512)])
def test_many_tiles_of_a_block(dtype: torch.dtype, hidden: int, width: int) -> None:
    tokens, at_once, experts = 40 * 512, 512, 3
    x, grad = make((tokens, hidden), dtype, 1).to(CUDA), make((tokens, hidden), dtype, 2).to(CUDA)
    w_up = make((experts, 2 * width, hidden), dtype, 3).to(CUDA)
    w_down = make((experts, hidden, width), dtype, 4).to(CUDA)
    ids, gates = make_ids(tokens, 1, experts, "uniform", 5).to(CUDA), torch.rand(tokens, 1, device=CUDA)

    def results(part: slice) -> list[Tensor]:
        leaves = [t[part].detach().requires_grad_() for t in (x, gates)]
        routing = scattermoe.route(ids[part], experts)
        y = scattermoe.moe_mlp(leaves[0], w_up, w_down, leaves[1], routing)
        rows = scattermoe.parallel_linear(x[part], w_up, routing)
        return [rows, y, *torch.autograd.grad(y, leaves, grad[part])]

    parts = [results(slice(first, first + at_once)) for first in range(0, tokens, at_once)]
    with poisoned_memory() as poison:
        poison()
        found = results(slice(None))
    # A row's sums are added up in the same order, whichever tile it is in.
    assert_same(found, [torch.cat(values) for values in zip(*parts, strict=True)])


# A kernel may begin before the one ahead of it has ended: it must not read yet what that one writes.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_gradient_right_behind_its_routing(dtype: torch.dtype) -> None:
    tokens, top_k, experts = 4096, 4, 16
    x, grad = make((tokens, 64), dtype, 1).to(CUDA), make((tokens * top_k, 128), dtype, 2).to(CUDA)
    weight = make((experts, 128, 64), dtype, 3).to(CUDA)
    all_ids = [make_ids(tokens, top_k, experts, routing, n).to(CUDA) for n in range(3) for routing in ROUTINGS]

    def gradient(ids: Tensor, wait: bool) -> Tensor:
        routing = scattermoe.route(ids, experts)
        if wait:
            torch.cuda.synchronize()
        of = torch.ops.scattermoe._parallel_linear_backward(
            grad, x, weight, routing.slot_order, routing.expert_offsets, top_k, False, True, None, [False, True, False]
        )
        return of[1]

    expected = [gradient(ids, wait=True) for ids in all_ids]
    assert_same([gradient(ids, wait=False) for ids in all_ids], expected)


# Nor may it write where that one reads: here w_up's columns are not adjacent, so the product reads a copy, which the library
# frees as soon as the product is launched.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [256, 1024, 4608])
def test_weight_gradient_right_behind_the_rows(dtype: torch.dtype, width: int) -> None:
    tokens, top_k, experts, hidden = 2048, 4, 16, 512
    x, grad = make((tokens, hidden), dtype, 1).to(CUDA), make((tokens, hidden), dtype, 2).to(CUDA)
    w_down = make((experts, hidden, width), dtype, 3).to(CUDA)
    spread = make((experts, 2 * width, 2 * hidden), dtype, 4).to(CUDA)[:, :, ::2]
    z, gates = make((tokens * top_k, 2 * width), dtype, 5).to(CUDA), torch.rand(tokens, top_k, device=CUDA)
    r = scattermoe.route(make_ids(tokens, top_k, experts, "skewed", 6).to(CUDA), experts)

    def gradients(w_up: Tensor, of_x: bool, of_weights: bool) -> list[Tensor]:
        tensors = (grad, x, w_up, w_down, None, gates, z, r.slot_order, r.slot_position, r.expert_offsets)
        mask = [of_x, of_weights, False, of_weights, False, False]
        of = torch.ops.scattermoe._moe_mlp_backward(*tensors, "swiglu", "gate_up", 1.0, 1.0, None, mask)
        return [of[0], of[1], of[3]]

    packed = spread.contiguous()
    expected = [gradients(packed, True, False)[0], *gradients(packed, False, True)[1:]]
    torch.cuda.synchronize()
    for _ in range(5):
        assert_same(gradients(spread, True, True), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 7])
def test_misaligned_storage(dtype: torch.dtype, offset: int) -> None:
    # The same numbers at another address: alignment may choose another kernel, never another result.
    def shifted(t: Tensor) -> Tensor:
        return torch.full((t.numel() + offset,), float("nan"), dtype=dtype, device=CUDA)[offset:].view(t.shape).copy_(t)

    routing = scattermoe.route(make_ids(100, 2, 5, "sentinels", 0).to(CUDA), 5)
    x, weight, grad = (make(s, dtype, n).to(CUDA) for n, s in enumerate(((100, 64), (5, 96, 64), (200, 96))))
    results = []
    for move in (lambda t: t, shifted):
        a, w = move(x).requires_grad_(), move(weight).requires_grad_()
        y = scattermoe.parallel_linear(a, w, routing)
        results.append([y, *torch.autograd.grad(y, [a, w], move(grad))])
    for aligned, moved in zip(*results, strict=True):
        assert row_error(moved, aligned.detach().double().cpu()) <= 2 * bound(dtype, 200, 1)


@pytest.mark.parametrize("experts", [1, 129, 1025, 4096])
def test_many_experts_and_slots(experts: int) -> None:
    ids = make_ids(8192, 8, experts, "sentinels", 0)
    routing = scattermoe.route(ids.to(CUDA), experts)
    order, position, offsets = reference.group(ids, experts)
    assert routing.slot_order.tolist() == order
    assert routing.expert_offsets.tolist() == offsets
    live = torch.tensor(position) < offsets[-1]
    assert torch.equal(routing.slot_position.flatten().cpu(), torch.tensor(position).where(live, -1).int())


def test_tf32_only_when_asked_for() -> None:
    routing = scattermoe.route(torch.zeros(256, 1, dtype=torch.int64, device=CUDA), 1)
    x, weight = make((256, 512), torch.float32, 0).to(CUDA), make((1, 128, 512), torch.float32, 1).to(CUDA)
    exact = x.double() @ weight[0].double().t()

    def error(allow: bool | None) -> float:
        y = torch.ops.scattermoe.parallel_linear(
            x, weight, None, routing.slot_order, routing.expert_offsets, 1, False, False, allow
        )
        return row_error(y, exact.cpu())

    ieee = bound(torch.float32, 512, 1)
    # TF32 keeps 10 bits of the mantissa.
    assert error(None) <= ieee and error(False) <= ieee
    assert error(True) <= 2.0**-9
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert error(False) <= ieee
        assert error(None) == error(True)
        scattermoe.kernels.ops.ALLOW_TF32 = False
        assert row_error(scattermoe.parallel_linear(x, weight, routing), exact.cpu()) <= ieee
    finally:
        scattermoe.kernels.ops.ALLOW_TF32 = None
        torch.backends.cuda.matmul.allow_tf32 = before


def test_process_goes_on_after_an_error() -> None:
    layer = Layer(torch.bfloat16)
    expected = layer.step()
    with pytest.raises((RuntimeError, ValueError)):
        scattermoe.moe_mlp(
            *(layer.inputs[n] for n in ("x", "w_up", "w_down", "gates")),
            scattermoe.route(layer.ids, EXPERTS),
            activation="nope",
        )
    assert_same(layer.step(), expected)


def test_memory_pool_and_garbage_are_left_alone() -> None:
    layer = Layer(torch.bfloat16)
    layer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        layer.step()
    assert memory_comes_back_to(before)


class TestLarge:
    """More than 2^31 elements in the activations, in the weights: checked on rows from both ends against the loops."""

    @staticmethod
    def needs(gigabytes: int) -> None:
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < gigabytes << 30:
            pytest.skip(f"needs {gigabytes} GiB of free GPU memory")

    @pytest.mark.slow
    @pytest.mark.parametrize("grouped_in", [False, True])
    @pytest.mark.parametrize("grouped_out", [False, True])
    def test_activations(self, grouped_in: bool, grouped_out: bool) -> None:
        self.needs(40)
        # 2^20 + 1000 slots of 2^11 + 8 features: the last rows lie past 2^31 elements, in and out.
        slots, width, experts = (1 << 20) + 1000, (1 << 11) + 8, 4
        ids = torch.randint(experts, (slots, 1), device=CUDA)
        ids[-1] = experts - 1
        routing = scattermoe.route(ids, experts)
        x = torch.randn(slots, width, device=CUDA, dtype=torch.bfloat16)
        weight = (torch.randn(experts, width, width, device=CUDA) * width**-0.5).bfloat16()
        linear = torch.ops.scattermoe.parallel_linear
        indices = (routing.slot_order, routing.expert_offsets)
        y = linear(x, weight, None, *indices, 1, grouped_in, grouped_out)
        assert x.numel() > 2**31 and y.numel() > 2**31
        order = routing.slot_order.long()
        places = torch.tensor([0, 1, slots // 2, slots - 2, slots - 1], device=CUDA)
        slot = order[places]  # grouped place -> slot
        expected = torch.stack(
            [
                weight[ids[s, 0]].double() @ x[p if grouped_in else s].double()
                for p, s in zip(places.tolist(), slot.tolist(), strict=True)
            ]
        )
        found = y[places if grouped_out else slot]
        assert row_error(found, expected.cpu()) <= bound(torch.bfloat16, width, 1)
        # Gradients: of x at the same rows, of the weight as a sum over everything against float32 chunks.
        grad = y.mul_(0.5)
        grad_x, grad_weight, _ = torch.ops.scattermoe._parallel_linear_backward(
            grad, x, weight, *indices, 1, grouped_in, grouped_out, None, [True, True, False]
        )
        expected = torch.stack(
            [
                weight[ids[s, 0]].double().t() @ grad[p if grouped_out else s].double()
                for p, s in zip(places.tolist(), slot.tolist(), strict=True)
            ]
        )
        assert row_error(grad_x[places if grouped_in else slot], expected.cpu()) <= bound(torch.bfloat16, width, 1)
        del grad_x
        total = torch.zeros(8, width, device=CUDA, dtype=torch.float64)
        members = (ids[:, 0] == experts - 1).nonzero()[:, 0]
        inverse = routing.slot_position.long().flatten()
        for part in members.split(1 << 15):
            place = inverse[part]
            total += (
                grad[place if grouped_out else part][:, :8].double().t() @ x[place if grouped_in else part].double()
            )
        assert row_error(grad_weight[-1, :8], total.cpu()) <= bound(torch.bfloat16, slots // experts, 1)

    @pytest.mark.slow
    @pytest.mark.parametrize("transposed", [False, True])
    def test_weights(self, transposed: bool) -> None:
        self.needs(24)
        experts, n_out, n_in = 130, 4096, 4104
        weight = torch.empty(experts, n_in, n_out, device=CUDA, dtype=torch.bfloat16).normal_(0, n_in**-0.5)
        weight = weight.transpose(1, 2) if transposed else weight.view(experts, n_out, n_in)
        assert weight.numel() > 2**31
        ids = torch.tensor([[0, 129], [128, 64], [129, 1]], device=CUDA)
        routing = scattermoe.route(ids, experts)
        x = torch.randn(3, n_in, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        weight.requires_grad_()
        y = scattermoe.parallel_linear(x, weight, routing)
        slots = [(t, j, int(ids[t, j])) for t in range(3) for j in range(2)]
        with torch.no_grad():
            expected = torch.stack([weight[e].double() @ x[t].double() for t, _, e in slots])
        assert row_error(y, expected.cpu()) <= bound(torch.bfloat16, n_in, 1)
        grad = torch.randn_like(y)
        y.backward(grad)
        with torch.no_grad():
            expected = torch.zeros(3, n_in, device=CUDA, dtype=torch.float64)
            for s, (t, _, e) in enumerate(slots):
                expected[t] += weight[e].double().t() @ grad[s].double()
            assert row_error(x.grad, expected.cpu()) <= bound(torch.bfloat16, 2 * n_out, 2)
            # Expert 129 got slots 1 and 4, expert 2 nothing.
            expected = torch.outer(grad[1].double(), x[0].double()) + torch.outer(grad[4].double(), x[2].double())
            assert row_error(weight.grad[129], expected.cpu()) <= bound(torch.bfloat16, 2, 1)
            assert bool((weight.grad[2] == 0).all())

    @pytest.mark.slow
    def test_fused_mlp(self) -> None:
        self.needs(60)
        # z has 2^31 elements and a few more.
        tokens, hidden, width, experts = (1 << 18) + 64, 512, 2048, 4
        ids = torch.randint(experts, (tokens, 2), device=CUDA)
        x = torch.randn(tokens, hidden, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        w_up = (torch.randn(experts, 2 * width, hidden, device=CUDA) * hidden**-0.5).bfloat16().requires_grad_()
        w_down = (torch.randn(experts, hidden, width, device=CUDA) * width**-0.5).bfloat16().requires_grad_()
        gates = torch.rand(tokens, 2, device=CUDA, requires_grad=True)
        y = scattermoe.moe_mlp(x, w_up, w_down, gates, scattermoe.route(ids, experts))
        grad = torch.randn_like(y)
        y.backward(grad)
        rows = [0, 1, tokens // 2, tokens - 1]
        leaves = [reference.leaf(t) for t in (x[rows], w_up, w_down, gates[rows])]
        expected = reference.moe_mlp(leaves[0], leaves[1], None, leaves[2], None, leaves[3], ids[rows].cpu())
        assert row_error(y[rows], expected) <= bound(torch.bfloat16, width, 5)
        correct = reference.gradients(expected, [leaves[0], leaves[3]], grad[rows])
        assert row_error(x.grad[rows], correct[0]) <= bound(torch.bfloat16, 2 * width, 6)
        assert row_error(gates.grad[rows], correct[1]) <= bound(torch.bfloat16, width, 5)

    @pytest.mark.slow
    def test_combine(self) -> None:
        self.needs(16)
        tokens, width = (1 << 19) + 100, (1 << 11) + 8
        ids = torch.randint(8, (tokens, 2), device=CUDA)
        routing = scattermoe.route(ids, 8)
        rows = torch.randn(2 * tokens, width, device=CUDA, dtype=torch.bfloat16)
        gates = torch.rand(tokens, 2, device=CUDA)
        assert rows.numel() > 2**31
        y = scattermoe.combine(rows, gates, routing)
        picked = [0, tokens // 2, tokens - 1]
        place = routing.slot_position[picked].long()
        expected = (rows[place].double() * gates[picked].double().unsqueeze(2)).sum(1)
        assert row_error(y[picked], expected.cpu()) <= bound(torch.bfloat16, 2, 1)


@pytest.mark.parametrize("case", [Combine(tokens=3000, width=264), Gating(tokens=5000, experts=256, k=8)], ids=repr)
def test_larger_rows(case: Combine | Gating) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        changes = {"dtype": dtype, "device": CUDA} | ({"gates": dtype} if isinstance(case, Combine) else {})
        check(type(case)(**(vars(case) | changes)))
