"""Bad input ends in an error that names the argument, the rule and both values: never a crash, never silent nonsense."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import scattermoe
from tests import reference

ERRORS = (RuntimeError, ValueError, TypeError, IndexError)


def refuses(work: Callable[[], Any], *words: str) -> None:
    """work() raises one of ERRORS, and every one of `words` (regular expressions) is in the message."""
    with pytest.raises(ERRORS) as caught:
        work()
    message = str(caught.value)
    assert "Unknown" not in message.split("\n")[0] and "INTERNAL ASSERT" not in message, message
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"


def size(n: int) -> str:
    return rf"(?<!\d){n}(?!\d)"


IDS = torch.tensor([[0, 1], [2, 1], [1, 0]])
T, K, E, H, W = 3, 2, 3, 4, 5


def routing(device: str) -> scattermoe.Routing:
    return scattermoe.route(IDS.to(device), E)


def float_of(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


class TestRoute:
    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.complex64], ids=str
    )
    def test_ids_that_are_not_integers(self, device: str, dtype: torch.dtype) -> None:
        refuses(lambda: scattermoe.route(IDS.to(device, dtype), E), "expert_ids", "integer")

    @pytest.mark.parametrize("shape", [(), (2, 2, 2)], ids=str)
    def test_dimensions(self, device: str, shape: tuple[int, ...]) -> None:
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        refuses(lambda: scattermoe.route(ids, E), "expert_ids", r"\[T, K\]", re.escape(str(list(shape))))

    def test_no_choices(self, device: str) -> None:
        refuses(lambda: scattermoe.route(torch.zeros(3, 0, dtype=torch.int64, device=device), E), "expert_ids", size(0))

    @pytest.mark.parametrize("experts", [0, -1, -(2**40)])
    def test_number_of_experts(self, device: str, experts: int) -> None:
        refuses(lambda: scattermoe.route(IDS.to(device), experts), "num_experts", str(experts))

    @pytest.mark.parametrize("where", ["cpu", "meta"])
    def test_more_experts_than_an_int32(self, where: str) -> None:
        refuses(
            lambda: scattermoe.route(torch.zeros(3, 2, dtype=torch.int64, device=where), 2**31),
            "num_experts",
            str(2**31),
        )

    def test_not_a_tensor(self) -> None:
        refuses(lambda: scattermoe.route([[0, 1]], 2))
        refuses(lambda: scattermoe.route(None, 2))

    @pytest.mark.parametrize("shape", [(2**30, 2), (2**31, 1), (2**31,), (2**40, 8), (1, 2**31)], ids=str)
    def test_slots_that_an_int32_cannot_count(self, shape: tuple[int, ...]) -> None:
        ids = torch.empty(shape, dtype=torch.int64, device="meta")
        refuses(lambda: scattermoe.route(ids, 8), "expert_ids|slots", str(ids.numel()), str(2**31 - 1))

    def test_slots_that_an_int32_can_count(self) -> None:
        found = scattermoe.route(torch.empty(2**30 - 1, 2, dtype=torch.int64, device="meta"), 8)
        assert found.slot_order.numel() == 2**31 - 2


def linear(device: str, **changes: Any) -> Callable[[], Any]:
    """parallel_linear with some arguments replaced, through the operator itself."""
    r = routing(device)
    args = {
        "x": float_of(T, H, device=device),
        "weight": float_of(E, W, H, device=device),
        "bias": float_of(E, W, device=device),
        "slot_order": r.slot_order,
        "expert_offsets": r.expert_offsets,
        "top_k": K,
        "grouped_in": False,
        "grouped_out": False,
    } | changes
    return lambda: torch.ops.scattermoe.parallel_linear(**args)


class TestParallelLinear:
    def test_the_call_itself_is_fine(self, device: str) -> None:
        linear(device)()

    def test_features(self, device: str) -> None:
        refuses(linear(device, x=float_of(T, 7, device=device)), r"x\.size\(1\)|\bx\b", "weight", size(7), size(H))

    def test_rows(self, device: str) -> None:
        refuses(linear(device, x=float_of(9, H, device=device)), r"\bx\b", "slot_order", size(18), size(6))

    def test_rows_of_grouped_input(self, device: str) -> None:
        x = float_of(T, H, device=device)
        refuses(linear(device, x=x, grouped_in=True, top_k=1), r"\bx\b", size(T), size(T * K))

    def test_top_k_of_grouped_input(self, device: str) -> None:
        refuses(linear(device, grouped_in=True), "top_k", size(2), size(1))

    @pytest.mark.parametrize("top_k", [0, -1])
    def test_top_k(self, device: str, top_k: int) -> None:
        refuses(linear(device, top_k=top_k), "top_k", str(top_k))

    def test_top_k_that_overflows(self, device: str) -> None:
        refuses(linear(device, top_k=2**62), "top_k")

    @pytest.mark.parametrize(
        "name, shape", [("x", (T,)), ("x", (1, T, H)), ("weight", (W, H)), ("bias", (W,)), ("bias", (E, W, 1))]
    )
    def test_dimensions(self, device: str, name: str, shape: tuple[int, ...]) -> None:
        refuses(linear(device, **{name: float_of(*shape, device=device)}), rf"\b{name}\b", size(len(shape)))

    def test_bias_sizes(self, device: str) -> None:
        refuses(linear(device, bias=float_of(E + 1, W, device=device)), "bias", "weight", size(E + 1), size(E))
        refuses(linear(device, bias=float_of(E, W + 1, device=device)), "bias", "weight", size(W + 1), size(W))

    def test_no_experts(self, device: str) -> None:
        offsets = torch.zeros(1, dtype=torch.int32, device=device)
        refuses(
            linear(device, weight=float_of(0, W, H, device=device), bias=None, expert_offsets=offsets),
            "weight",
            size(0),
        )

    def test_experts_of_the_routing(self, device: str) -> None:
        refuses(
            linear(device, weight=float_of(E + 2, W, H, device=device), bias=None),
            "expert_offsets|routing|num_experts",
            "weight",
        )

    @pytest.mark.parametrize("name", ["x", "weight", "bias"])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.complex64, torch.bool], ids=str)
    def test_dtypes_that_are_not_floating(self, device: str, name: str, dtype: torch.dtype) -> None:
        shape = {"x": (T, H), "weight": (E, W, H), "bias": (E, W)}[name]
        refuses(
            linear(device, **{name: float_of(*shape, device=device, dtype=dtype)}), rf"\b{name}\b", "(?i)float|dtype"
        )

    def test_everything_integer(self, device: str) -> None:
        ints = {
            n: float_of(*s, device=device, dtype=torch.int64)
            for n, s in {"x": (T, H), "weight": (E, W, H), "bias": (E, W)}.items()
        }
        refuses(linear(device, **ints), r"\bx\b", "(?i)float", "(?i)int|long")

    @pytest.mark.parametrize("name", ["weight", "bias"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_mixed_dtypes(self, device: str, name: str, dtype: torch.dtype) -> None:
        shape = {"weight": (E, W, H), "bias": (E, W)}[name]
        words = {torch.float64: "(?i)double|float64", torch.bfloat16: "(?i)bfloat16", torch.float16: "(?i)half|float16"}
        refuses(
            linear(device, **{name: float_of(*shape, device=device, dtype=dtype)}),
            rf"\b{name}\b",
            r"\bx\b",
            words[dtype],
            "(?i)float",
        )

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex128], ids=str)
    def test_unsupported_dtypes(self, device: str, dtype: torch.dtype) -> None:
        changes = {
            n: float_of(*s, device=device).to(dtype)
            for n, s in {"x": (T, H), "weight": (E, W, H), "bias": (E, W)}.items()
        }
        refuses(linear(device, **changes), r"\bx\b|parallel_linear", "(?i)float8|complex")

    @pytest.mark.parametrize("name", ["x", "weight", "bias", "slot_order", "expert_offsets"])
    def test_devices(self, device: str, name: str) -> None:
        r = routing(device)
        tensors = {
            "x": float_of(T, H, device=device),
            "weight": float_of(E, W, H, device=device),
            "bias": float_of(E, W, device=device),
            "slot_order": r.slot_order,
            "expert_offsets": r.expert_offsets,
        }
        refuses(linear(device, **{name: tensors[name].to("meta")}), rf"\b{name}\b|\bx\b", "device", "meta", device)

    @pytest.mark.parametrize("name", ["slot_order", "expert_offsets"])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.int16], ids=str)
    def test_dtypes_of_indices(self, device: str, name: str, dtype: torch.dtype) -> None:
        refuses(linear(device, **{name: getattr(routing(device), name).to(dtype)}), name, "(?i)int32|int\\b")

    def test_sparse_weight(self, device: str) -> None:
        refuses(linear(device, weight=float_of(E, W, H, device=device).to_sparse()))

    def test_old_signature_points_to_the_compatible_module(self, device: str) -> None:
        r = routing(device)
        x, weight = float_of(T, H, device=device), float_of(E, H, W, device=device)
        with pytest.raises(TypeError, match=r"scattermoe\.parallel_experts\.parallel_linear"):
            scattermoe.parallel_linear(x, weight, K, r.expert_offsets, r.slot_order, r.expert_offsets)

    def test_x_that_fits_neither_tokens_nor_slots(self, device: str) -> None:
        x, weight = float_of(4, H, device=device), float_of(E, W, H, device=device)
        refuses(
            lambda: scattermoe.parallel_linear(x, weight, routing(device)), r"\bx\b", size(4), f"{size(3)}|{size(6)}"
        )

    def test_x_with_leading_dimensions(self, device: str) -> None:
        x, weight = float_of(1, T, H, device=device), float_of(E, W, H, device=device)
        refuses(lambda: scattermoe.parallel_linear(x, weight, routing(device)), r"\bx\b", "3|dim")

    @pytest.mark.parametrize("wrong", ["grad.size(0)", "grad.size(1)", "dtype"])
    def test_gradient(self, device: str, wrong: str) -> None:
        r = routing(device)
        shape = {"grad.size(0)": (7, W), "grad.size(1)": (6, 9), "dtype": (6, W)}[wrong]
        grad = float_of(*shape, device=device, dtype=torch.float64 if wrong == "dtype" else torch.float32)
        refuses(
            lambda: torch.ops.scattermoe._parallel_linear_backward(
                *(
                    grad,
                    float_of(T, H, device=device),
                    float_of(E, W, H, device=device),
                    r.slot_order,
                    r.expert_offsets,
                ),
                *(K, False, False, None, [True, True, True]),
            ),
            "grad",
            {"grad.size(0)": size(7), "grad.size(1)": size(9), "dtype": "(?i)double|float64"}[wrong],
        )

    def test_slots_that_an_int32_cannot_count(self) -> None:
        meta = {"device": "meta", "dtype": torch.int32}
        for slots in (2**31, 2**40):
            refuses(
                linear(
                    "cpu",
                    x=torch.empty(slots // 2, H, device="meta"),
                    weight=torch.empty(E, W, H, device="meta"),
                    bias=None,
                    slot_order=torch.empty(slots, **meta),
                    expert_offsets=torch.empty(E + 1, **meta),
                ),
                "slot_order|slots",
                str(slots),
            )

    def test_more_elements_than_an_int32_are_fine(self) -> None:
        meta = {"device": "meta", "dtype": torch.int32}
        y = torch.ops.scattermoe.parallel_linear(
            *(torch.empty(2**22, 2**12, device="meta"), torch.empty(64, 2**14, 2**12, device="meta"), None),
            *(torch.empty(2**23, **meta), torch.empty(65, **meta), 2),
        )
        assert y.shape == (2**23, 2**14)


def mlp(device: str, **changes: Any) -> Callable[[], Any]:
    r = routing(device)
    args = {
        "x": float_of(T, H, device=device),
        "w_up": float_of(E, 2 * W, H, device=device),
        "b_up": float_of(E, 2 * W, device=device),
        "w_down": float_of(E, H, W, device=device),
        "b_down": float_of(E, H, device=device),
        "gates": float_of(T, K, device=device),
        **r._asdict(),
    } | changes
    return lambda: torch.ops.scattermoe.moe_mlp(**args)


MLP_SHAPES = {
    "x": (T, H),
    "w_up": (E, 2 * W, H),
    "b_up": (E, 2 * W),
    "w_down": (E, H, W),
    "b_down": (E, H),
    "gates": (T, K),
}


class TestMoeMlp:
    def test_the_call_itself_is_fine(self, device: str) -> None:
        mlp(device)()

    @pytest.mark.parametrize(
        "name, dim", [(n, d) for n, s in MLP_SHAPES.items() for d in range(len(s)) if (n, d) != ("w_down", 1)]
    )
    def test_sizes(self, device: str, name: str, dim: int) -> None:
        # Every size of every argument that another one fixes, one too large (w_down.size(1) fixes itself the output's).
        shape = list(MLP_SHAPES[name])
        right = shape[dim]
        shape[dim] = 17
        changes: dict[str, Any] = {name: float_of(*shape, device=device)}
        if not name.startswith("b_"):
            changes |= {"b_up": None, "b_down": None}
        doubled = name == "w_down" and dim == 2
        refuses(
            mlp(device, **changes),
            rf"\b{name}\b",
            f"{size(17)}|{size(34)}" if doubled else size(17),
            size(2 * right) if doubled else size(right),
        )

    @pytest.mark.parametrize("name", MLP_SHAPES)
    def test_dimensions(self, device: str, name: str) -> None:
        refuses(
            mlp(device, **{name: float_of(*MLP_SHAPES[name], 1, device=device)}),
            rf"\b{name}\b",
            size(len(MLP_SHAPES[name]) + 1),
        )

    @pytest.mark.parametrize("name", MLP_SHAPES)
    def test_dtypes_that_are_not_floating(self, device: str, name: str) -> None:
        refuses(
            mlp(device, **{name: float_of(*MLP_SHAPES[name], device=device, dtype=torch.int64)}),
            rf"\b{name}\b",
            "(?i)float|dtype",
        )

    @pytest.mark.parametrize("name", ["w_up", "b_up", "w_down", "b_down"])
    def test_mixed_dtypes(self, device: str, name: str) -> None:
        tensor = float_of(*MLP_SHAPES[name], device=device, dtype=torch.bfloat16)
        refuses(mlp(device, **{name: tensor}), rf"\b{name}\b", r"\bx\b", "(?i)bfloat16", "(?i)float")

    @pytest.mark.parametrize("name", [*MLP_SHAPES, "slot_order", "slot_position", "expert_offsets"])
    def test_devices(self, device: str, name: str) -> None:
        tensors = {n: float_of(*s, device=device) for n, s in MLP_SHAPES.items()} | routing(device)._asdict()
        refuses(mlp(device, **{name: tensors[name].to("meta")}), rf"\b{name}\b|\bx\b", "device", "meta", device)

    def test_no_experts(self, device: str) -> None:
        refuses(
            mlp(
                device,
                w_up=float_of(0, 2 * W, H, device=device),
                w_down=float_of(0, H, W, device=device),
                b_up=None,
                b_down=None,
                expert_offsets=torch.zeros(1, dtype=torch.int32, device=device),
            ),
            "w_up",
            size(0),
        )

    @pytest.mark.parametrize("name", ["SwiGLU", "", "silu ", "tanh"])
    def test_unknown_activation_lists_the_known(self, device: str, name: str) -> None:
        refuses(
            mlp(device, activation=name), "activation", re.escape(name), *(rf"\b{a}\b" for a in reference.ACTIVATIONS)
        )

    def test_unknown_layout_lists_the_known(self, device: str) -> None:
        refuses(mlp(device, glu_layout="gate_down"), "glu_layout", "gate_down", *reference.GLU_LAYOUTS)

    @pytest.mark.parametrize("limit", [-1.0, float("nan")])
    def test_limit(self, device: str, limit: float) -> None:
        refuses(mlp(device, activation="swiglu_clamped", limit=limit), "limit", "-1|(?i:nan)")

    def test_a_gated_activation_needs_both_halves(self, device: str) -> None:
        changes = {"w_up": float_of(E, W, H, device=device), "b_up": None}
        refuses(mlp(device, **changes), "w_up", "gated", size(W), size(2 * W))
        mlp(device, **changes, activation="silu")()

    def test_a_plain_activation_needs_one(self, device: str) -> None:
        refuses(mlp(device, activation="silu"), "w_up", "not gated|plain", size(2 * W), size(W))

    def test_nan_gates_pass_through(self, device: str) -> None:
        gates = float_of(T, K, device=device)
        gates[1, 0] = float("nan")
        y = mlp(device, gates=gates)()
        assert y.isnan().all(dim=1).tolist() == [False, True, False]

    def test_weights_that_need_a_gradient_but_are_integer(self, device: str) -> None:
        # Parameters of a quantised checkpoint, say: PyTorch itself refuses the gradient, the operator the dtype.
        weight = torch.ones(E, 2 * W, H, dtype=torch.int8, device=device)
        refuses(lambda: weight.requires_grad_(), "(?i)floating")
        refuses(mlp(device, w_up=weight), "w_up", "(?i)float|dtype", "(?i)int8|char")

    def test_slots_that_an_int32_cannot_count(self) -> None:
        meta = {"device": "meta", "dtype": torch.int32}
        refuses(
            mlp(
                "cpu",
                **{n: torch.empty(s, device="meta") for n, s in MLP_SHAPES.items() if n not in ("x", "gates")},
                x=torch.empty(2**30, H, device="meta"),
                gates=torch.empty(2**30, K, device="meta"),
                slot_order=torch.empty(2**31, **meta),
                slot_position=torch.empty(2**30, K, **meta),
                expert_offsets=torch.empty(E + 1, **meta),
            ),
            "slot_order|slots|slot_position",
            str(2**31),
        )

    def test_function_checks_too(self, device: str) -> None:
        r = routing(device)
        x, gates = float_of(T, H, device=device), float_of(T, K, device=device)
        w_up, w_down = float_of(E, 2 * W, H, device=device), float_of(E, H, W, device=device)
        refuses(lambda: scattermoe.moe_mlp(x.unsqueeze(0), w_up, w_down, gates, r), r"\bx\b")
        refuses(lambda: scattermoe.moe_mlp(x, w_up, w_down, gates[:, :1], r), "gates", size(1), size(2))
        refuses(
            lambda: scattermoe.moe_mlp(x, w_up, w_down, gates, r, activation="nope"), "activation", "nope", "swiglu"
        )
        refuses(lambda: scattermoe.moe_mlp(x, w_up, w_down, gates, r, activation=torch.nn.SiLU()))

    @pytest.mark.parametrize("name", ["grad", "z"])
    def test_gradient(self, device: str, name: str) -> None:
        tensors = {n: float_of(*s, device=device) for n, s in MLP_SHAPES.items()}
        del tensors["b_up"]
        args = {"grad": float_of(T, H, device=device)} | tensors | {"z": float_of(T * K, 2 * W, device=device)}
        args = {n: args[n] for n in ("grad", "x", "w_up", "w_down", "b_down", "gates", "z")}
        args[name] = float_of(17, args[name].size(1), device=device)
        refuses(
            lambda: torch.ops.scattermoe._moe_mlp_backward(
                *args.values(), *routing(device), "swiglu", "gate_up", 1.702, 7.0, None, [True] * 6
            ),
            rf"\b{name}\b",
            size(17),
        )


def combine(device: str, **changes: Any) -> Callable[[], Any]:
    r = routing(device)
    args = {
        "rows": float_of(T * K, H, device=device),
        "gates": float_of(T, K, device=device),
        "slot_order": r.slot_order,
        "slot_position": r.slot_position,
    } | changes
    return lambda: torch.ops.scattermoe.combine(**args)


class TestCombine:
    def test_the_call_itself_is_fine(self, device: str) -> None:
        combine(device)()

    def test_rows(self, device: str) -> None:
        refuses(combine(device, rows=float_of(T, H, device=device)), "rows", size(T), size(T * K))

    def test_gates(self, device: str) -> None:
        refuses(combine(device, gates=float_of(T + 1, K, device=device)), "gates", size(T + 1), size(T))
        refuses(combine(device, gates=float_of(T, K + 1, device=device)), "gates", size(K + 1), size(K))

    @pytest.mark.parametrize(
        "name, shape", [("rows", (T * K,)), ("rows", (T, K, H)), ("gates", (T * K,)), ("gates", (T, K, 1))]
    )
    def test_dimensions(self, device: str, name: str, shape: tuple[int, ...]) -> None:
        refuses(combine(device, **{name: float_of(*shape, device=device)}), rf"\b{name}\b", size(len(shape)))

    @pytest.mark.parametrize("name, shape", [("rows", (T * K, H)), ("gates", (T, K))])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
    def test_dtypes(self, device: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        refuses(
            combine(device, **{name: float_of(*shape, device=device, dtype=dtype)}), rf"\b{name}\b", "(?i)float|dtype"
        )

    @pytest.mark.parametrize("name", ["rows", "gates", "slot_order", "slot_position"])
    def test_devices(self, device: str, name: str) -> None:
        tensors = {"rows": float_of(T * K, H, device=device), "gates": float_of(T, K, device=device)} | routing(
            device
        )._asdict()
        refuses(combine(device, **{name: tensors[name].to("meta")}), rf"\b{name}\b|\brows\b", "device", "meta", device)

    @pytest.mark.parametrize("name", ["slot_order", "slot_position"])
    def test_dtypes_of_indices(self, device: str, name: str) -> None:
        refuses(combine(device, **{name: getattr(routing(device), name).long()}), name, "(?i)int32|int\\b")

    def test_slots_that_an_int32_cannot_count(self) -> None:
        meta = {"device": "meta", "dtype": torch.int32}
        refuses(
            combine(
                "cpu",
                rows=torch.empty(2**31, H, device="meta"),
                gates=None,
                slot_order=torch.empty(2**31, **meta),
                slot_position=torch.empty(2**30, K, **meta),
            ),
            "rows|slot",
            str(2**31),
        )


class TestTopkGating:
    @pytest.mark.parametrize("k", [0, -1, 9])
    def test_k(self, device: str, k: int) -> None:
        refuses(
            lambda: scattermoe.topk_gating(torch.randn(4, 8, device=device), k),
            r"\bk\b",
            str(k),
            *([size(8)] if k == 9 else []),
        )

    def test_dimensions(self, device: str) -> None:
        for shape in ((8,), (2, 4, 8)):
            refuses(
                lambda s=shape: scattermoe.topk_gating(torch.randn(s, device=device), 2), "logits", size(len(shape))
            )

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
    def test_dtypes(self, device: str, dtype: torch.dtype) -> None:
        refuses(
            lambda: scattermoe.topk_gating(torch.ones(4, 8, device=device).to(dtype), 2), "logits", "(?i)float|dtype"
        )

    def test_scoring_lists_the_known(self, device: str) -> None:
        refuses(
            lambda: scattermoe.topk_gating(torch.randn(4, 8, device=device), 2, scoring="tanh"),
            "scoring",
            "tanh",
            "softmax",
            "sigmoid",
        )

    def test_groups(self, device: str) -> None:
        logits = torch.randn(4, 8, device=device)
        refuses(lambda: scattermoe.topk_gating(logits, 2, num_groups=3, top_groups=1), "num_groups", size(3), size(8))
        refuses(lambda: scattermoe.topk_gating(logits, 2, num_groups=0), "num_groups", size(0))
        refuses(lambda: scattermoe.topk_gating(logits, 2, num_groups=4, top_groups=5), "top_groups", size(5), size(4))
        refuses(lambda: scattermoe.topk_gating(logits, 2, num_groups=4, top_groups=0), "top_groups", size(0))
        # Two experts in the one group that is left, three wanted.
        refuses(lambda: scattermoe.topk_gating(logits, 3, num_groups=4, top_groups=1), r"\bk\b", size(3), size(2))

    def test_selection_bias(self, device: str) -> None:
        logits = torch.randn(4, 8, device=device)

        def call(bias: Tensor) -> Callable[[], Any]:
            return lambda: scattermoe.topk_gating(logits, 2, selection_bias=bias)

        refuses(call(torch.zeros(7, device=device)), "selection_bias", size(7), size(8))
        refuses(call(torch.zeros(4, 8, device=device)), "selection_bias", size(2))
        refuses(call(torch.zeros(8, dtype=torch.int64, device=device)), "selection_bias", "(?i)float|dtype")
        refuses(call(torch.zeros(8, device="meta")), "selection_bias|logits", "device", "meta", device)

    def test_no_experts(self, device: str) -> None:
        refuses(lambda: scattermoe.topk_gating(torch.randn(4, 0, device=device), 1), r"logits|\bk\b", size(0))


class TestCorruptRouting:
    """Indices made by hand, or overwritten: on the CPU every one is checked before it is followed."""

    @staticmethod
    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    @pytest.mark.parametrize("bad", [6, 99, -1, 2**31 - 1])
    def test_slot_order(self, bad: int) -> None:
        slot_order = self.int32(0, 1, 2, 3, 4, bad)
        refuses(linear("cpu", slot_order=slot_order), "slot_order", size(6), str(bad))
        refuses(mlp("cpu", slot_order=slot_order), "slot_order", size(6), str(bad))

    @pytest.mark.parametrize("offsets", [(0, 2, 5, 99), (0, 4, 2, 6), (-1, 2, 5, 6), (1, 2, 5, 6)], ids=str)
    def test_expert_offsets(self, offsets: tuple[int, ...]) -> None:
        refuses(linear("cpu", expert_offsets=self.int32(*offsets)), "expert_offsets")
        refuses(mlp("cpu", expert_offsets=self.int32(*offsets)), "expert_offsets")

    @pytest.mark.parametrize("bad", [6, 77, -2, -(2**31)])
    def test_slot_position(self, bad: int) -> None:
        slot_position = routing("cpu").slot_position.clone()
        slot_position[1, 1] = bad
        refuses(combine("cpu", slot_position=slot_position), "slot_position", size(6), str(bad))
        refuses(mlp("cpu", slot_position=slot_position), "slot_position", size(6), str(bad))

    def test_expert_ids_of_the_gradient(self) -> None:
        backward = torch.ops.scattermoe._topk_gating_backward
        ids = torch.tensor([[9], [0]])
        refuses(
            lambda: backward(torch.ones(2, 1), torch.ones(2, 4), ids, "softmax", False, 1.0),
            "expert_ids",
            size(4),
            size(9),
        )


class TestMeta:
    """The meta kernels apply the same rules with the same words: a model fails while it is traced, not when it runs."""

    @pytest.mark.parametrize("op", ["linear", "mlp", "combine"])
    def test_same_message(self, op: str) -> None:
        def message(where: str) -> str:
            def at(t: Any) -> Any:
                return t.to(where)

            r = scattermoe.Routing(*map(at, routing("cpu")))
            if op == "linear":
                call = linear(
                    "cpu",
                    x=at(torch.ones(T, 7)),
                    weight=at(torch.ones(E, W, H)),
                    bias=None,
                    slot_order=r[0],
                    expert_offsets=r[2],
                )
            elif op == "mlp":
                tensors = {n: at(torch.ones(s)) for n, s in MLP_SHAPES.items()}
                call = mlp("cpu", **(tensors | r._asdict() | {"gates": at(torch.ones(T, 9))}))
            else:
                call = combine("cpu", rows=at(torch.ones(5, H)), gates=None, slot_order=r[0], slot_position=r[1])
            with pytest.raises(ERRORS) as caught:
                call()
            return str(caught.value).split("\n")[0]

        assert message("cpu") == message("meta")

    def test_shapes_and_dtypes(self) -> None:
        r = scattermoe.route(torch.empty(6, 2, dtype=torch.int64, device="meta"), 4)
        assert [t.shape for t in r] == [(12,), (6, 2), (5,)]
        x = torch.empty(6, 8, device="meta", dtype=torch.bfloat16)
        w_up, w_down = (torch.empty(s, device="meta", dtype=torch.bfloat16) for s in ((4, 10, 8), (4, 8, 5)))
        gates = torch.empty(6, 2, device="meta")
        y = scattermoe.moe_mlp(x, w_up, w_down, gates, r)
        assert y.shape == (6, 8) and y.dtype == torch.bfloat16 and y.device.type == "meta"
        y = scattermoe.parallel_linear(x, w_up, r, grouped_out=True)
        assert y.shape == (12, 10)
        assert scattermoe.combine(y, gates, r).shape == (6, 10)
        found, ids = scattermoe.topk_gating(torch.empty(6, 4, device="meta", dtype=torch.bfloat16), 2)
        assert found.dtype == torch.float32 and ids.dtype == torch.int64


def test_process_goes_on_after_errors(device: str) -> None:
    for _ in range(3):
        refuses(mlp(device, activation="nope"), "activation")
        refuses(linear(device, top_k=0), "top_k")
    assert bool(mlp(device)().isfinite().all())
