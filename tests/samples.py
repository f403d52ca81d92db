"""A few calls of every operator, the backward ones too, for the checks that take an operator and its arguments."""

from __future__ import annotations

from typing import Any

import torch

import scattermoe
from tests.cases import Mlp, make, make_ids, mlp_tensors, to_device

SETTINGS = ("swiglu", "gate_up", 1.702, 7.0, None)


def linear_arguments(
    device: str, dtype: torch.dtype, rows: str, bias: bool, routing: str, layout: str, grads: bool
) -> list[Any]:
    """x, weight, bias, slot_order, expert_offsets, top_k, grouped_in."""
    experts, tokens, top_k = 4, 6, 2
    ids = make_ids(tokens, top_k, experts, routing, 1).to(device)
    indices = scattermoe.route(ids, experts)
    x = to_device(make((tokens if rows == "token" else tokens * top_k, 5), dtype, 2), device)
    weight = to_device(make((experts, 3, 5), dtype, 3, 0.5, layout), device)
    b = to_device(make((experts, 3), dtype, 4), device) if bias else None
    for tensor in (x, weight, b):
        if tensor is not None:
            tensor.requires_grad_(grads)
    return [
        x,
        weight,
        b,
        indices.slot_order,
        indices.expert_offsets,
        top_k if rows == "token" else 1,
        rows == "grouped",
    ]


def op_samples(device: str) -> list[tuple[str, str, tuple[Any, ...]]]:
    """(operator, what is special, arguments)."""
    samples: list[tuple[str, str, tuple[Any, ...]]] = []

    def add(op: str, label: str, *args: Any) -> None:
        samples.append((op, label, args))

    for shape, routing, dtype in (
        ((6, 2), "uniform", torch.int64),
        ((7,), "sentinels", torch.int32),
        ((0, 3), "uniform", torch.int64),
    ):
        ids = make_ids(shape[0], shape[-1] if len(shape) == 2 else 1, 4, routing, 0, dtype).reshape(shape).to(device)
        add("group_by_expert", f"{list(shape)} {routing}", ids, 4)

    for rows, grouped_out, bias, routing, layout, dtype in (
        ("token", False, True, "uniform", "contiguous", torch.float32),
        ("token", True, False, "sentinels", "transposed", torch.float64),
        ("slot", True, True, "one_expert", "contiguous", torch.float32),
        ("grouped", False, False, "few_experts", "transposed", torch.bfloat16),
        ("grouped", True, True, "sentinels", "contiguous", torch.float32),
    ):
        label = f"{rows} {'grouped' if grouped_out else 'scattered'} {'bias ' if bias else ''}{routing} {layout}"
        args = linear_arguments(device, dtype, rows, bias, routing, layout, True)
        add("parallel_linear", label, *args, grouped_out, None)
        x, weight, _, slot_order, offsets, top_k, grouped_in = args
        grad = to_device(make((slot_order.size(0), 3), dtype, 5), device).requires_grad_()
        for mask in ([True, True, bias], [True, False, False], [False, True, False]):
            add(
                "_parallel_linear_backward",
                f"{label} {mask}",
                *(grad, x, weight, slot_order, offsets, top_k, grouped_in, grouped_out, None, mask),
            )

    for gates_dtype, grouped, routing, dtype in (
        (torch.float32, True, "uniform", torch.float32),
        (None, True, "sentinels", torch.float64),
        (torch.float32, False, "repeated", torch.bfloat16),
    ):
        ids = make_ids(6, 2, 4, routing, 1).to(device)
        indices = scattermoe.route(ids, 4)
        rows = to_device(make((12, 5), dtype, 2), device).requires_grad_()
        gates = None if gates_dtype is None else to_device(make((6, 2), gates_dtype, 3), device).requires_grad_()
        grad = to_device(make((6, 5), dtype, 4), device).requires_grad_()
        label = f"{'grouped' if grouped else 'scattered'} {routing} gates {gates_dtype}"
        add("combine", label, rows, gates, indices.slot_order, indices.slot_position, grouped)
        for mask in ([True, gates is not None], [True, False]):
            add(
                "_combine_backward",
                f"{label} {mask}",
                *(grad, rows, gates, indices.slot_order, indices.slot_position, grouped, mask),
            )

    for activation, glu_layout, biases, routing, dtype, gates_dtype in (
        ("swiglu", "gate_up", (), "uniform", torch.float32, torch.float32),
        ("swiglu_clamped", "interleaved", ("b_up", "b_down"), "sentinels", torch.float64, torch.float64),
        ("gelu", "gate_up", ("b_down",), "few_experts", torch.bfloat16, torch.float32),
    ):
        case = Mlp(
            tokens=6, experts=4, hidden=5, width=3, activation=activation, biases=biases, dtype=dtype, gates=gates_dtype
        )
        tensors = [None if t is None else to_device(t, device) for t in mlp_tensors(case, 7).values()]
        indices = scattermoe.route(make_ids(6, 2, 4, routing, 1).to(device), 4)
        settings = (activation, glu_layout, 1.702, 7.0, None)
        _, z = torch.ops.scattermoe._moe_mlp_forward(*tensors, *indices, *settings)
        x, w_up, b_up, w_down, b_down, gates = tensors
        grad = to_device(make((6, 5), dtype, 8), device)
        label = f"{activation} {glu_layout} {routing} {'+'.join(biases)}"
        for mask in ([True, True, b_up is not None, True, b_down is not None, True], [True] + 5 * [False]):
            add(
                "_moe_mlp_backward",
                f"{label} {mask}",
                *(grad, x, w_up, w_down, b_down, gates, z, *indices, *settings, mask),
            )
            add(
                "_moe_mlp_backward_over_z",
                f"{label} {mask}",
                *(grad, x, w_up, w_down, b_down, gates, z.clone(), *indices, *settings, mask),
            )
        add("_moe_mlp_forward", label, *tensors, *indices, *settings)
        hidden = torch.ops.scattermoe._activation(z, *settings[:4])
        add("_activation", label, z, *settings[:4])
        add("_activation_backward", label, hidden, z, gates, indices.slot_order, indices.expert_offsets, *settings[:4])
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
        add("moe_mlp", label, *leaves, *indices, *settings)
        add("moe_mlp", f"{label} recompute", *leaves, *indices, *settings, True)

    for scoring, normalize, groups, bias, dtype in (
        ("softmax", False, (1, 1), False, torch.float32),
        ("sigmoid", True, (4, 2), True, torch.float64),
        ("softmax", True, (1, 1), True, torch.bfloat16),
    ):
        logits = to_device(make((6, 8), dtype, 9), device).requires_grad_()
        selection = to_device(make((8,), torch.float32, 10), device) if bias else None
        label = f"{scoring} {normalize} {groups} {bias}"
        add("topk_gating", label, logits, 3, scoring, normalize, selection, *groups, 2.0)
        gates, ids = torch.ops.scattermoe.topk_gating(logits.detach(), 3, scoring, normalize, selection, *groups, 2.0)
        add("_topk_gating_backward", label, torch.randn_like(gates), logits.detach(), ids, scoring, normalize, 2.0)
    return samples


def op_named(name: str) -> Any:
    return getattr(torch.ops.scattermoe, name).default
