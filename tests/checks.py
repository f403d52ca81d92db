"""Runs one case through the library and through the reference and compares the results and every gradient asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import scattermoe
from tests import reference
from tests.cases import Case, Combine, Gating, Linear, Mlp, generator, make, make_ids, mlp_tensors, seed_of, to_device
from tests.tolerances import ROUNDINGS, assert_close, bound, rms_norm, roundoff, row_error


def on_device(tensors: dict[str, Tensor | None], device: str, wanted: tuple[str, ...]) -> dict[str, Tensor | None]:
    """The tensors on `device`, those in `wanted` as leaves that require a gradient."""
    moved = {name: None if t is None else to_device(t, device).detach() for name, t in tensors.items()}
    for name in wanted:
        if moved.get(name) is not None:
            moved[name].requires_grad_()
    return moved


def perturbed(tensors: dict[str, Tensor | None], size: float, seed: int) -> dict[str, Tensor | None]:
    """float64 leaves with every element of `tensors` a relative `size` off, up or down."""
    moved: dict[str, Tensor | None] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        leaf = reference.leaf(tensor)
        if leaf is not None:
            sign = torch.randint(2, leaf.shape, generator=generator(seed + number)) * 2 - 1
            leaf = (leaf.detach() * (1 + size * sign)).requires_grad_()
        moved[name] = leaf
    return moved


def compare(
    op: str,
    call: Callable[[dict[str, Tensor | None]], Tensor],
    oracle: Callable[[dict[str, Tensor | None]], Tensor],
    tensors: dict[str, Tensor | None],
    case: Linear | Combine | Mlp,
    lengths: dict[str, int],
) -> None:
    """Forward and the gradients in case.grads of `call` against `oracle`."""
    seed = seed_of(case)
    inputs = on_device(tensors, case.device, case.grads)
    wanted = [name for name in case.grads if inputs.get(name) is not None]
    y = call(inputs)
    assert y.requires_grad == bool(wanted)
    grad = make(tuple(y.shape), case.dtype, seed + 99, 1.0, case.grad_layout)
    found = {"y": y}
    if wanted:
        grads = torch.autograd.grad(y, [inputs[name] for name in wanted], to_device(grad, case.device))
        found |= dict(zip(wanted, grads, strict=True))

    def correct(leaves: dict[str, Tensor | None], grad: Tensor) -> dict[str, Tensor]:
        expected = oracle(leaves)
        grads = reference.gradients(expected, [leaves[name] for name in wanted], grad) if wanted else []
        return {"y": expected.detach()} | dict(zip(wanted, grads, strict=True))

    def sensitivity() -> dict[str, Tensor]:
        # How far each result moves, by the reference itself, per relative change of what goes in.
        size, most = 1e-5, {name: torch.zeros_like(t) for name, t in expected.items()}
        for draw in range(4):
            around = perturbed({**tensors, "grad": grad}, size, seed + 100 * (draw + 1))
            moved = correct(around, around.pop("grad"))
            for name, value in expected.items():
                most[name] = torch.maximum(most[name], (moved[name] - value).abs() / size)
        return most

    expected = correct({name: reference.leaf(t) for name, t in tensors.items()}, grad)
    scales: dict[str, Tensor] = {}
    for name, actual in found.items():
        label = f"{op} {name if name == 'y' else f'grad {name}'}"
        like = next(iter(tensors.values())) if name == "y" else inputs[name]
        assert actual.dtype == like.dtype, f"{label}: expected {like.dtype}, got {actual.dtype}"
        assert actual.device.type == torch.device(case.device).type, f"{label} is on {actual.device}"
        # Gates in float32 beside activations in bfloat16 carry the activations' roundings, and the other way round.
        mixed = [actual.dtype, case.dtype, case.gates or case.dtype] if isinstance(case, Mlp) else [actual.dtype]
        dtype, roundings = max(mixed, key=roundoff), ROUNDINGS[op][name]
        if row_error(actual, expected[name]) > bound(dtype, lengths[name], roundings):
            scales = scales or sensitivity()
        assert_close(label, actual, expected[name], lengths[name], roundings, dtype, scales.get(name))


def check_linear(case: Linear) -> None:
    seed = seed_of(case)
    ids = make_ids(case.tokens, case.top_k, case.experts, case.routing, seed, case.id_dtype)
    ids = ids.reshape(-1) if case.flat_ids and case.top_k == 1 else ids
    slots = case.tokens * case.top_k
    tensors = {
        "x": make(
            (case.tokens if case.rows == "token" else slots, case.n_in), case.dtype, seed + 1, 1.0, case.x_layout
        ),
        "weight": make(
            (case.experts, case.n_out, case.n_in), case.dtype, seed + 2, max(case.n_in, 1) ** -0.5, case.weight_layout
        ),
        "bias": make((case.experts, case.n_out), case.dtype, seed + 3) if case.bias else None,
    }
    routing = scattermoe.route(ids.to(case.device), case.experts)

    def call(t: dict[str, Tensor | None]) -> Tensor:
        return scattermoe.parallel_linear(
            t["x"],
            t["weight"],
            routing,
            bias=t["bias"],
            grouped_in=case.rows == "grouped",
            grouped_out=case.grouped_out,
        )

    def oracle(t: dict[str, Tensor | None]) -> Tensor:
        return reference.parallel_linear(t["x"], t["weight"], t["bias"], ids, case.rows, case.grouped_out)

    lengths = {"y": case.n_in + 1, "x": case.n_out * case.top_k, "weight": slots, "bias": slots}
    compare("parallel_linear", call, oracle, tensors, case, lengths)


def check_combine(case: Combine) -> None:
    seed = seed_of(case)
    ids = make_ids(case.tokens, case.top_k, case.experts, case.routing, seed)
    gates = None
    if case.gates is not None:
        gates = make((case.tokens, case.top_k), case.gates, seed + 2, 1.0, case.gates_layout)
    rows = make((case.tokens * case.top_k, case.width), case.dtype, seed + 1, 1.0, case.rows_layout)
    routing = scattermoe.route(ids.to(case.device), case.experts)
    compare(
        "combine",
        lambda t: scattermoe.combine(t["rows"], t["gates"], routing, grouped=case.grouped),
        lambda t: reference.combine(t["rows"], t["gates"], ids, case.experts, case.grouped),
        {"rows": rows, "gates": gates},
        case,
        {"y": case.top_k, "rows": 1, "gates": case.width},
    )


def check_mlp(case: Mlp) -> None:
    seed = seed_of(case)
    ids = make_ids(case.tokens, case.top_k, case.experts, case.routing, seed)
    routing = scattermoe.route(ids.to(case.device), case.experts)

    def call(t: dict[str, Tensor | None]) -> Tensor:
        return scattermoe.moe_mlp(
            t["x"],
            t["w_up"],
            t["w_down"],
            t["gates"],
            routing,
            activation=case.activation,
            glu_layout=case.glu_layout,
            up_bias=t["b_up"],
            down_bias=t["b_down"],
            limit=case.limit,
            recompute=case.recompute,
        )

    def oracle(t: dict[str, Tensor | None]) -> Tensor:
        return reference.moe_mlp(
            t["x"],
            t["w_up"],
            t["b_up"],
            t["w_down"],
            t["b_down"],
            t["gates"],
            ids,
            case.activation,
            case.glu_layout,
            limit=case.limit,
        )

    slots = case.tokens * case.top_k
    n_out = case.hidden if case.n_out is None else case.n_out
    inner = case.hidden + case.up_rows + n_out
    lengths = {
        "y": inner + case.top_k,
        "x": inner + case.top_k,
        "w_up": inner + slots,
        "b_up": inner + slots,
        "w_down": inner + slots,
        "b_down": slots,
        "gates": inner,
    }
    compare("moe_mlp", call, oracle, mlp_tensors(case, seed), case, lengths)


def check_gating(case: Gating) -> None:
    seed = seed_of(case)
    logits = make((case.tokens, case.experts), case.dtype, seed + 1, 1.5, case.layout)
    selection_bias = make((case.experts,), torch.float32, seed + 2, 0.3) if case.selection_bias else None
    given = to_device(logits, case.device).detach().requires_grad_()
    gates, expert_ids = scattermoe.topk_gating(
        given,
        case.k,
        scoring=case.scoring,
        normalize=case.normalize,
        selection_bias=None if selection_bias is None else selection_bias.to(case.device),
        num_groups=case.num_groups,
        top_groups=case.top_groups,
        scale=case.scale,
    )
    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert gates.dtype == compute
    assert expert_ids.dtype == torch.int64
    assert gates.shape == expert_ids.shape == (case.tokens, case.k)
    assert gates.requires_grad and not expert_ids.requires_grad

    ids = expert_ids.cpu()
    leaf = reference.leaf(logits)
    bias = None if selection_bias is None else selection_bias.double()
    chosen, margins = reference.topk_choice(leaf, case.k, case.scoring, bias, case.num_groups, case.top_groups)
    # The choice itself, wherever arithmetic of this precision cannot turn it around.
    close = bound(compute, case.experts, 2)
    for token, (experts, margin) in enumerate(zip(chosen, margins, strict=True)):
        row = ids[token].tolist()
        assert len(set(row)) == case.k and all(0 <= e < case.experts for e in row), f"token {token} chose {row}"
        if margin > close:
            assert set(row) == experts, f"token {token} chose {row}, reference {sorted(experts)}"
    assert bool((gates[:, 1:] <= gates[:, :-1]).all()), "gates are not descending"

    rounding = ROUNDINGS["topk_gating"]
    expected = reference.gates_of(leaf, ids, case.scoring, case.normalize, case.scale)
    assert_close("topk_gating gates", gates, expected, case.experts, rounding["gates"])
    grad = make((case.tokens, case.k), compute, seed + 3, 1.0, case.grad_layout)
    (found,) = torch.autograd.grad(gates, given, to_device(grad, case.device))
    (correct,) = reference.gradients(expected, [leaf], grad)
    assert found.dtype == case.dtype
    # A difference of terms of this size, which for a renormalised single gate cancel altogether.
    size = rms_norm(expected.detach() * grad.double())
    error = row_error(found, correct, scale=torch.full_like(correct, size * case.experts**-0.5), exact_zeros=False)
    limit = bound(compute, case.experts, rounding["logits"]) + bound(case.dtype, 1, 1)
    assert error <= limit, f"topk_gating grad logits: per-row relative error {error:.3g} is above {limit:.3g}"


CHECKS: dict[type, Callable[..., None]] = {
    Linear: check_linear,
    Combine: check_combine,
    Mlp: check_mlp,
    Gating: check_gating,
}


def check(case: Case) -> None:
    """Runs the check that belongs to the case's type."""
    CHECKS[type(case)](case)
