"""`explain`: which kernels an operator launches, asked without a GPU; and, on a GPU, that it launches those."""

import doctest
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import scattermoe
from scattermoe import explain
from scattermoe.kernels import ops as switches
from scattermoe.launches import code_arch

OPS = ("group_by_expert", "parallel_linear", "combine", "moe_mlp", "topk_gating")
SIZES = {"num_tokens": 4096, "num_experts": 16, "top_k": 4, "hidden_size": 1024, "intermediate_size": 512}
FEW = {**SIZES, "num_tokens": 8}
GEMM, GRAD = "{}::grouped_gemm_kernel", "{}::weight_grad_kernel"

# (op, backward, other arguments) -> what is launched on a chip whose kernels are in a namespace.
MOE_BACKWARD = [
    GEMM,
    "activation_backward_kernel",
    GRAD,
    GEMM,
    "combine_kernel",
    GRAD,
]
PORTABLE: list[tuple[str, bool, dict[str, Any], list[str]]] = [
    ("group_by_expert", False, {}, ["count_kernel", "prefix_kernel", "rank_kernel"]),
    ("group_by_expert", False, FEW, ["rank_kernel"]),
    ("parallel_linear", False, {}, [GEMM]),
    ("parallel_linear", True, {}, [GEMM, "combine_kernel", GRAD]),
    ("parallel_linear", True, {"grouped_in": True}, [GEMM, GRAD]),
    ("parallel_linear", True, {"bias": True}, [GEMM, "combine_kernel", GRAD, "bias_grad_kernel", "add_parts_kernel"]),
    ("parallel_linear", True, {**FEW, "bias": True}, [GEMM, "combine_kernel", GRAD, "bias_grad_kernel"]),
    ("combine", False, {}, ["combine_kernel"]),
    ("combine", True, {}, ["combine_backward_kernel"]),
    ("moe_mlp", False, {}, [GEMM, "activation_forward_kernel", GEMM, "combine_kernel"]),
    ("moe_mlp", True, {}, MOE_BACKWARD),
    ("topk_gating", False, {}, ["topk_gating_kernel"]),
    ("topk_gating", True, {}, ["topk_gating_backward_kernel"]),
]


def kernels(op: str, **arguments: Any) -> list[str]:
    return [launch.kernel for launch in explain(op, **{**SIZES, **arguments})]


@pytest.mark.parametrize(("op", "backward", "arguments", "names"), PORTABLE)
@pytest.mark.parametrize(("dtype", "namespace"), [("bfloat16", "sm80"), ("float16", "sm80"), ("float64", "simt")])
def test_portable_kernels(
    op: str, backward: bool, arguments: dict[str, Any], names: list[str], dtype: str, namespace: str
) -> None:
    expected = [name.format(namespace) for name in names]
    for device in ("sm_80", "sm_120"):
        assert kernels(op, backward=backward, dtype=dtype, device=device, **arguments) == expected


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", ["cpu", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
def test_every_launch_says_why(dtype: str, device: str) -> None:
    for op in OPS:
        for backward in (False, True) if op != "group_by_expert" else (False,):
            launches = explain(op, dtype=dtype, device=device, backward=backward, **SIZES)
            assert launches
            for launch in launches:
                product = launch.kernel.endswith(("gemm_kernel", "weight_grad_kernel"))
                assert (launch.tile is not None) == (launch.stages is not None) == product
                assert launch.step and launch.why and launch.kernel in str(launch)
                assert (device == "cpu") == (not launch.kernel.endswith("_kernel"))


def test_hopper() -> None:
    assert kernels("moe_mlp", device="sm_90") == ["sm90::grouped_gemm_kernel"] * 2 + ["combine_kernel"]
    assert explain("moe_mlp", device="sm_90", **SIZES)[0].step == "up projection with activation"
    gemm, grad = "sm90::grouped_gemm_kernel", "sm90::weight_grad_kernel"
    backward = [gemm, "gate_grad_kernel", gemm, grad, grad]
    assert kernels("moe_mlp", device="sm_90", backward=True) == backward
    assert "gate_grad_bias_kernel" in kernels("moe_mlp", device="sm_90", backward=True, bias=True)
    fused = [explain("moe_mlp", device="sm_90", backward=True, **{**SIZES, "hidden_size": h})[0] for h in (1024, 2048)]
    assert [launch.tile for launch in fused] == [(128, 256, 64), (128, 256, 64)]
    one_part = kernels("moe_mlp", device="sm_90", backward=True, intermediate_size=256)
    assert one_part[0] == gemm and "gate_grad_kernel" not in one_part


def test_sum_beside_a_gradient_of_weights() -> None:
    gemm, grad = "sm90::grouped_gemm_kernel", "sm90::weight_grad_kernel"

    def places(**sizes: Any) -> list[str]:
        launches = explain("moe_mlp", device="sm_90", backward=True, **{**SIZES, **sizes})[2:]
        assert [launch.kernel for launch in launches if launch.kernel != "combine_kernel"].count(grad) == 2
        assert all(("fourth warpgroup" in launch.why) == ("beside" in launch.step) for launch in launches)
        return [f"{'sum and ' * ('beside' in launch.step)}{launch.kernel}" for launch in launches]

    # Beside the gradient of w_down, which is the smaller; of w_up where the other is too short to hide the sum, or to be had
    # for less memory: 16384 slots, 16 experts.
    assert places() == [gemm, f"sum and {grad}", grad]
    assert places(num_experts=64) == [gemm, f"sum and {grad}", grad]
    assert places(intermediate_size=504) == [grad, gemm, f"sum and {grad}"]
    assert places(hidden_size=504) == [grad, gemm, f"sum and {grad}"]
    # By itself where the gradient of w_up is larger than the rows, but not than what the gradient of w_down is computed from.
    assert places(hidden_size=64, intermediate_size=1024) == [grad, gemm, "combine_kernel", grad]
    # Or so short beside that gradient that a fourth warpgroup costs more: then behind it, where the rows find room.
    assert places(intermediate_size=8192, num_experts=64) == [gemm, grad, "combine_kernel", grad]
    assert places(intermediate_size=8192, num_experts=4, hidden_size=1024) == [grad, gemm, "combine_kernel", grad]
    # Kernels that have no fourth warpgroup.
    other: dict[str, Any]
    for other in ({"dtype": "float32"}, {"hidden_size": 1020}, {"device": "sm_80"}):
        names = kernels("moe_mlp", **{"device": "sm_90", "backward": True, **other})
        assert names[-2] == "combine_kernel" and names[-1].endswith("weight_grad_kernel")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_tokens": 8}, "few rows"),
        ({"hidden_size": 1020}, "multiples of 16 bytes"),
        ({"dtype": torch.float32}, "IEEE"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_hopper_leaves_it_to_the_others(arguments: dict[str, Any], reason: str) -> None:
    first = explain("parallel_linear", device="sm_90", **{**SIZES, **arguments})[0]
    assert first.kernel in ("sm80::grouped_gemm_kernel", "simt::grouped_gemm_kernel") and reason in first.why


@pytest.mark.parametrize(
    "arguments", [{"activation": "geglu"}, {"transposed": True}, {"intermediate_size": 500}, {"num_tokens": 8}]
)
def test_activation_in_a_pass_of_its_own(arguments: dict[str, Any]) -> None:
    assert "activation_forward_kernel" in kernels("moe_mlp", device="sm_90", **arguments)
    assert "activation_backward_kernel" in kernels("moe_mlp", device="sm_90", backward=True, **arguments)


def test_weight_gradient_with_both_sides_gathered() -> None:
    scattered = explain("parallel_linear", device="sm_90", backward=True, **SIZES)[2]
    assert scattered.kernel == "sm80::weight_grad_kernel" and "both operands are gathered" in scattered.why
    grouped = explain("parallel_linear", device="sm_90", backward=True, grouped_out=True, **SIZES)[2]
    assert grouped.kernel == "sm90::weight_grad_kernel" and grouped.tile == (128, 256, 64)
    assert "transposed" in grouped.why
    # A transposed weight gets the transposed product, whose other side is gathered.
    transposed = explain("parallel_linear", device="sm_90", backward=True, grouped_out=True, transposed=True, **SIZES)
    assert transposed[2].tile == (128, 256, 64) and "transposed" not in transposed[2].why
    # Columns that would fill every other tile of a pair.
    narrow = {**SIZES, "hidden_size": 128}
    few = explain("parallel_linear", device="sm_90", backward=True, grouped_out=True, **narrow)[2]
    assert few.tile == (256, 128, 64) and "cooperative" in few.why


def test_tf32_follows_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    for switch, kernel in ((True, "sm80::grouped_gemm_kernel"), (False, "simt::grouped_gemm_kernel")):
        monkeypatch.setattr(switches, "ALLOW_TF32", switch)
        assert kernels("parallel_linear", device="sm_80", dtype="float32") == [kernel]


@pytest.mark.parametrize("device", ["cpu", "sm_80", "sm_90"])
def test_nothing_to_compute(device: str) -> None:
    for op in OPS:
        assert kernels(op, device=device, num_tokens=0) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": "gemm"}, "expected one of group_by_expert"),
        ({"op": "group_by_expert", "backward": True}, "no backward"),
        ({"dtype": torch.int8}, "unknown dtype 'int8', expected one of bfloat16"),
        ({"activation": "tanh"}, "unknown activation 'tanh'"),
        ({"glu_layout": "up"}, "unknown glu_layout 'up'"),
        ({"num_experts": 0}, "expected num_experts >= 1, got 0"),
        ({"hidden_size": -1}, "expected hidden_size >= 0, got -1"),
        ({"device": "sm_70"}, "expected arch >= 80, got 70"),
        ({"device": "sm_x"}, "such as sm_90"),
        ({"device": "meta"}, "expected device"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(**{"op": "moe_mlp", "device": "sm_80", **SIZES, **arguments})


@pytest.mark.parametrize(
    ("capability", "arch"),
    [(75, None), (80, 80), (86, 86), (87, 86), (90, 90), (100, 100), (103, 100), (120, 120), (130, 120)],
)
def test_code_for_a_gpu(capability: int, arch: int | None) -> None:
    archs = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120", "compute_120"]
    assert code_arch(archs, capability) == arch


def test_example_of_the_extension_module() -> None:
    (example,) = doctest.DocTestFinder().find(
        scattermoe._C.explain.__doc__, "explain", globs={"scattermoe": scattermoe}
    )
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0


def test_command() -> None:
    def run(device: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "scattermoe", "--explain", device]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("sm_90")
    assert done.returncode == 0 and "sm90::weight_grad_kernel 128x256x64" in done.stdout, done.stderr
    done = run("sm_70")
    assert done.returncode == 2 and "expected arch >= 80" in done.stderr


# ---- On a GPU ----


def launched(call: Any) -> list[str]:
    """The kernels of this library that a call launches, in their order, as `explain` names them."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    if not events:
        pytest.skip("the profiler sees no kernels here")
    names = (event.name.replace("(anonymous namespace)::", "") for event in events)
    found = (re.match(r"(?:void )?scattermoe::kernels::((?:\w+::)?\w+_kernel)", name) for name in names)
    return [match[1] for match in found if match]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "changes", [{}, {"num_tokens": 8}, {"intermediate_size": 504}, {"hidden_size": 1020}, {"transposed": True}]
)
@pytest.mark.parametrize("bias", [False, True])
def test_cuda_launches_what_is_explained(changes: dict[str, Any], dtype: torch.dtype, bias: bool) -> None:
    arguments = {**SIZES, **changes}
    tokens, experts, top_k, hidden, inner = (arguments[name] for name in SIZES)
    transposed = arguments.get("transposed", False)
    options: dict[str, Any] = {"device": "cuda", "dtype": dtype}

    def weight(out_features: int, in_features: int) -> torch.Tensor:
        if transposed:
            return torch.randn(experts, in_features, out_features, **options).transpose(1, 2).requires_grad_()
        return torch.randn(experts, out_features, in_features, **options).requires_grad_()

    def vector(size: int) -> torch.Tensor | None:
        return torch.randn(experts, size, **options).requires_grad_() if bias else None

    def check(op: str, call: Any, **more: Any) -> None:
        """`call` computes the op's output; its gradients are those of every floating tensor it reads."""
        query = {**arguments, "dtype": dtype, "bias": bias, **more}
        assert launched(call) == [launch.kernel for launch in explain(op, **query)]
        y = call()
        grad = torch.randn_like(y)
        expected = [launch.kernel for launch in explain(op, backward=True, **query)]
        assert launched(lambda: y.backward(grad, retain_graph=True)) == expected

    logits = torch.randn(tokens, experts, device="cuda", requires_grad=True)
    gates, ids = scattermoe.topk_gating(logits, top_k)
    gates = gates.detach().requires_grad_()
    routing = scattermoe.route(ids, experts)
    assert launched(lambda: scattermoe.route(ids, experts)) == kernels("group_by_expert", **changes)
    check("topk_gating", lambda: scattermoe.topk_gating(logits, top_k)[0])

    x = torch.randn(tokens, hidden, **options).requires_grad_()
    rows = torch.randn(tokens * top_k, hidden, **options).requires_grad_()
    check("combine", lambda: scattermoe.combine(rows, gates, routing))
    w_up, b_up, w_down, b_down = weight(2 * inner, hidden), vector(2 * inner), weight(hidden, inner), vector(hidden)
    check("moe_mlp", lambda: scattermoe.moe_mlp(x, w_up, w_down, gates, routing, up_bias=b_up, down_bias=b_down))
    for grouped_out in (False, True):
        check(
            "parallel_linear",
            lambda grouped_out=grouped_out: scattermoe.parallel_linear(
                x, w_up, routing, bias=b_up, grouped_out=grouped_out
            ),
            intermediate_size=2 * inner,
            grouped_out=grouped_out,
        )
