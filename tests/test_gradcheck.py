"""Numerical derivatives in float64: first ones of everything, second ones where they exist."""

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import scattermoe
from tests import reference
from tests.cases import Mlp, make, make_ids, mlp_tensors, to_device

ROUTINGS = ("uniform", "sentinels", "repeated", "few_experts")
ROWS = ("token", "slot", "grouped")


def leaf(shape: tuple[int, ...], seed: int, device: str, layout: str = "contiguous") -> torch.Tensor:
    return to_device(make(shape, torch.float64, seed, 1.0, layout), device).requires_grad_()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("grouped_out", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_parallel_linear(device: str, routing: str, rows: str, grouped_out: bool, layout: str) -> None:
    indices = scattermoe.route(make_ids(4, 2, 3, routing, 0).to(device), 3)
    x = leaf((4 if rows == "token" else 8, 3), 1, device)
    weight, bias = leaf((3, 2, 3), 2, device, layout), leaf((3, 2), 3, device)

    def f(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return scattermoe.parallel_linear(
            x, weight, indices, bias=bias, grouped_in=rows == "grouped", grouped_out=grouped_out
        )

    assert gradcheck(f, (x, weight, bias))
    assert gradgradcheck(f, (x, weight, bias))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_parallel_linear_second_derivative_of_some(device: str, frozen: str) -> None:
    indices = scattermoe.route(make_ids(4, 2, 3, "sentinels", 0).to(device), 3)
    inputs = {"x": leaf((4, 3), 1, device), "weight": leaf((3, 2, 3), 2, device), "bias": leaf((3, 2), 3, device)}
    inputs[frozen].requires_grad_(False)

    def f(*tensors: torch.Tensor) -> torch.Tensor:
        x, weight, bias = tensors
        # Nonlinear, so that the second derivative involves every gradient.
        return scattermoe.parallel_linear(x, weight, indices, bias=bias).tanh()

    assert gradgradcheck(f, tuple(inputs.values()))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("with_gates", [False, True])
def test_combine(device: str, routing: str, grouped: bool, with_gates: bool) -> None:
    indices = scattermoe.route(make_ids(4, 2, 3, routing, 0).to(device), 3)
    rows, gates = leaf((8, 3), 1, device), leaf((4, 2), 2, device) if with_gates else None
    if gates is None:
        assert gradcheck(lambda r: scattermoe.combine(r, None, indices, grouped=grouped), (rows,))
        assert gradgradcheck(lambda r: scattermoe.combine(r, None, indices, grouped=grouped).tanh(), (rows,))
        return

    def f(rows: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return scattermoe.combine(rows, gates, indices, grouped=grouped)

    assert gradcheck(f, (rows, gates))
    assert gradgradcheck(f, (rows, gates))


@pytest.mark.parametrize("frozen", ["rows", "gates"])
def test_combine_second_derivative_of_some(device: str, frozen: str) -> None:
    indices = scattermoe.route(make_ids(4, 2, 3, "sentinels", 0).to(device), 3)
    inputs = {"rows": leaf((8, 3), 1, device), "gates": leaf((4, 2), 2, device)}
    inputs[frozen].requires_grad_(False)
    assert gradgradcheck(lambda r, g: scattermoe.combine(r, g, indices).tanh(), tuple(inputs.values()))


def second_derivatives(f: Callable[..., Tensor], inputs: list[Tensor], wanted: list[int], seed: int) -> list[Tensor]:
    """Derivatives of a sum over all first derivatives, for the inputs and for the gradient that arrives."""
    leaves = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    y = f(*leaves)
    arriving = make(tuple(y.shape), torch.float64, seed).to(y.device).requires_grad_()
    sources = [leaves[i] for i in wanted]
    first = torch.autograd.grad(y, sources, arriving, create_graph=True)
    total = sum((g * make(tuple(g.shape), torch.float64, seed + 1 + n).to(g.device)).sum() for n, g in enumerate(first))
    found = torch.autograd.grad(total, [*sources, arriving], allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip([*sources, arriving], found, strict=True)]


# gradgradcheck differentiates one first derivative at a time; here all of them arrive together.
@pytest.mark.parametrize("wanted", [w for n in (1, 2, 3) for w in itertools.combinations(range(3), n)], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("grouped_out", [False, True])
def test_parallel_linear_second_derivatives_at_once(
    device: str, wanted: tuple[int, ...], rows: str, grouped_out: bool
) -> None:
    ids = make_ids(4, 2, 3, "sentinels", 0)
    indices = scattermoe.route(ids.to(device), 3)
    shapes = ((4 if rows == "token" else 8, 3), (3, 2, 3), (3, 2))
    inputs = [make(s, torch.float64, n) for n, s in enumerate(shapes)]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return scattermoe.parallel_linear(
            x, weight, indices, bias=bias, grouped_in=rows == "grouped", grouped_out=grouped_out
        )

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.parallel_linear(x, weight, bias, ids, rows, grouped_out)

    found = second_derivatives(ours, [t.to(device) for t in inputs], list(wanted), 10)
    for a, b in zip(found, second_derivatives(plain, inputs, list(wanted), 10), strict=True):
        torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_combine_second_derivatives_at_once(device: str, wanted: tuple[int, ...], grouped: bool) -> None:
    ids = make_ids(4, 2, 3, "sentinels", 0)
    indices = scattermoe.route(ids.to(device), 3)
    inputs = [make(s, torch.float64, n) for n, s in enumerate(((8, 3), (4, 2)))]
    found = second_derivatives(
        lambda r, g: scattermoe.combine(r, g, indices, grouped=grouped),
        [t.to(device) for t in inputs],
        list(wanted),
        10,
    )
    plain = second_derivatives(lambda r, g: reference.combine(r, g, ids, 3, grouped), inputs, list(wanted), 10)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("routing", ["uniform", "sentinels"])
def test_moe_mlp(device: str, activation: str, routing: str) -> None:
    case = Mlp(tokens=4, experts=3, hidden=3, width=2, activation=activation)
    tensors = mlp_tensors(case, 3)
    inputs = [to_device(t, device).requires_grad_() for t in tensors.values()]
    indices = scattermoe.route(make_ids(4, 2, 3, routing, 1).to(device), 3)
    for glu_layout in reference.GLU_LAYOUTS if activation in reference.GATED else ("gate_up",):

        def f(x, w_up, b_up, w_down, b_down, gates, glu_layout=glu_layout) -> torch.Tensor:
            return scattermoe.moe_mlp(
                *(x, w_up, w_down, gates, indices),
                activation=activation,
                glu_layout=glu_layout,
                up_bias=b_up,
                down_bias=b_down,
                limit=1.0,
            )

        assert gradcheck(f, inputs)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (3, 2)])
def test_topk_gating(device: str, scoring: str, normalize: bool, groups: tuple[int, int]) -> None:
    logits = leaf((5, 6), 1, device)

    def f(logits: torch.Tensor) -> torch.Tensor:
        return scattermoe.topk_gating(
            logits, 2, scoring=scoring, normalize=normalize, num_groups=groups[0], top_groups=groups[1], scale=1.5
        )[0]

    assert gradcheck(f, (logits,))


def test_moe_mlp_says_that_it_has_no_second_derivative(device: str) -> None:
    inputs = [to_device(t, device).requires_grad_() for t in mlp_tensors(Mlp(), 3).values()]
    x, w_up, b_up, w_down, b_down, gates = inputs
    indices = scattermoe.route(make_ids(11, 2, 5, "uniform", 1).to(device), 5)
    y = scattermoe.moe_mlp(x, w_up, w_down, gates, indices, up_bias=b_up, down_bias=b_down)
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"moe_mlp.*(double backward|second derivative|not supported|differentiated twice)"
    ):
        sum(g.sum() for g in first).backward()


def test_topk_gating_says_that_it_has_no_second_derivative(device: str) -> None:
    logits = leaf((5, 6), 1, device)
    gates, _ = scattermoe.topk_gating(logits, 2)
    (first,) = torch.autograd.grad(gates.square().sum(), logits, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"topk_gating.*(double backward|second derivative|not supported|differentiated twice)"
    ):
        first.sum().backward()


def test_forward_mode_works_or_says_no(device: str) -> None:
    indices = scattermoe.route(make_ids(4, 2, 3, "uniform", 0).to(device), 3)
    weight = leaf((3, 2, 3), 2, device).detach()
    x = leaf((4, 3), 1, device).detach()
    tangent = torch.randn_like(x)
    try:
        _, found = torch.func.jvp(lambda x: scattermoe.parallel_linear(x, weight, indices), (x,), (tangent,))
    except (RuntimeError, NotImplementedError) as error:
        assert re.search("parallel_linear|forward|functorch", str(error))
    else:
        torch.testing.assert_close(found, scattermoe.parallel_linear(tangent, weight, indices))
