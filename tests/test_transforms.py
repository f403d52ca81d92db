"""Checkpointing, autocast, functional_call, vmap, inference mode: the rest of PyTorch that wraps around an operator."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import checkpoint

import scattermoe
from tests.cases import Mlp, make, make_ids, mlp_tensors, to_device
from tests.modes import Calls

EXPERTS = 5


def mlp_inputs(device: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], scattermoe.Routing]:
    tensors = mlp_tensors(Mlp(dtype=dtype), 3)
    routing = scattermoe.route(make_ids(11, 2, EXPERTS, "sentinels", 3).to(device), EXPERTS)
    return [to_device(t, device).requires_grad_() for t in tensors.values()], routing


def mlp(x: Tensor, w_up: Tensor, b_up: Tensor, w_down: Tensor, b_down: Tensor, gates: Tensor, routing: Any) -> Tensor:
    return scattermoe.moe_mlp(x, w_up, w_down, gates, routing, up_bias=b_up, down_bias=b_down)


def composed(
    x: Tensor, w_up: Tensor, b_up: Tensor, w_down: Tensor, b_down: Tensor, gates: Tensor, routing: Any
) -> Tensor:
    z = scattermoe.parallel_linear(x, w_up, routing, bias=b_up, grouped_out=True)
    rows = scattermoe.parallel_linear(torch.tanh(z[:, ::2]), w_down, routing, bias=b_down, grouped_in=True)
    return scattermoe.combine(rows, gates, routing, grouped=False)


@pytest.mark.parametrize("layer", [mlp, composed], ids=["moe_mlp", "composed"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_activation_checkpointing(device: str, layer: Any, use_reentrant: bool) -> None:
    inputs, routing = mlp_inputs(device)
    plain = layer(*inputs, routing)
    checked = checkpoint.checkpoint(layer, *inputs, routing, use_reentrant=use_reentrant)
    assert torch.equal(plain, checked)
    for a, b in zip(
        torch.autograd.grad(plain.square().sum(), inputs),
        # Reentrant checkpointing runs a backward of its own and only knows .backward().
        backward_of(checked.square().sum(), inputs),
        strict=True,
    ):
        assert torch.equal(a, b)


def backward_of(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    for tensor in inputs:
        tensor.grad = None
    loss.backward()
    return [t.grad for t in inputs if t.grad is not None]


def test_selective_checkpointing_keeps_what_the_policy_says(device: str) -> None:
    inputs, routing = mlp_inputs(device)
    kept = {torch.ops.scattermoe.moe_mlp.default, torch.ops.scattermoe._moe_mlp_forward.default}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
        return checkpoint.CheckpointPolicy.MUST_SAVE if op in kept else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    def block(*args: Any) -> Tensor:
        return torch.tanh(mlp(*args)).square()

    def run(context: Any) -> tuple[tuple[Tensor, ...], int]:
        with Calls() as calls:
            options = {} if context is None else {"context_fn": context}
            y = checkpoint.checkpoint(block, *inputs, routing, use_reentrant=False, **options)
            grads = torch.autograd.grad(y.sum(), inputs)
        return grads, calls.count("_moe_mlp_forward")

    plain = torch.autograd.grad(block(*inputs, routing).sum(), inputs)
    recomputed, forwards = run(None)
    selective, kept_forwards = run(functools.partial(checkpoint.create_selective_checkpoint_contexts, policy))
    for grads in (recomputed, selective):
        for a, b in zip(grads, plain, strict=True):
            assert torch.equal(a, b)
    assert (forwards, kept_forwards) == (2, 1)


def test_compiled_checkpointing(device: str, fresh_compiler: None) -> None:
    inputs, routing = mlp_inputs(device, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def block(*args: Any) -> Tensor:
        return checkpoint.checkpoint(mlp, *args, use_reentrant=False)

    found = torch.autograd.grad(block(*inputs, routing).square().sum(), inputs)
    for a, b in zip(found, torch.autograd.grad(mlp(*inputs, routing).square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


class TestAutocast:
    """Like linear: x and the weights go to autocast's dtype, their gradients come back in their own."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("layer", [mlp, composed], ids=["moe_mlp", "composed"])
    def test_casts(self, device: str, dtype: torch.dtype, layer: Any) -> None:
        inputs, routing = mlp_inputs(device, torch.float32)
        with torch.autocast(device, dtype=dtype):
            y = layer(*inputs, routing)
        assert y.dtype == dtype
        grads = torch.autograd.grad(y.float().sum(), inputs)
        assert [g.dtype for g in grads] == [torch.float32] * len(grads)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_equals_casting_by_hand(self, device: str, dtype: torch.dtype) -> None:
        inputs, routing = mlp_inputs(device, torch.float32)
        with torch.autocast(device, dtype=dtype):
            y = mlp(*inputs, routing)
            rows = scattermoe.parallel_linear(inputs[0], inputs[1], routing, bias=inputs[2])
        cast = [t.to(dtype) for t in inputs[:5]]
        assert torch.equal(y, mlp(*cast, inputs[5], routing))  # the gates are not rounded
        assert torch.equal(rows, scattermoe.parallel_linear(cast[0], cast[1], routing, bias=cast[2]))

    @pytest.mark.parametrize("layer", [mlp, composed], ids=["moe_mlp", "composed"])
    def test_leaves_float64_alone(self, device: str, layer: Any) -> None:
        inputs, routing = mlp_inputs(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            y = layer(*inputs, routing)
        assert torch.equal(y, layer(*inputs, routing))

    def test_mixed_inputs(self, device: str) -> None:
        # bfloat16 activations from the layer before, float32 master weights.
        inputs, routing = mlp_inputs(device, torch.float32)
        x = inputs[0].detach().bfloat16().requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            y = mlp(x, *inputs[1:], routing)
        grads = torch.autograd.grad(y.float().sum(), [x, inputs[1]])
        assert y.dtype == torch.bfloat16
        assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]

    def test_gating_computes_in_float32(self, device: str) -> None:
        logits = torch.randn(9, 8, device=device)
        expected = scattermoe.topk_gating(logits, 3)
        with torch.autocast(device, dtype=torch.bfloat16):
            gates, ids = scattermoe.topk_gating(logits, 3)
            low, _ = scattermoe.topk_gating(logits.bfloat16(), 3)
        assert gates.dtype == low.dtype == torch.float32
        assert torch.equal(gates, expected[0]) and torch.equal(ids, expected[1])

    def test_nothing_happens_when_it_is_off(self, device: str) -> None:
        inputs, routing = mlp_inputs(device, torch.float32)
        with torch.autocast(device, dtype=torch.bfloat16), torch.autocast(device, enabled=False):
            assert mlp(*inputs, routing).dtype == torch.float32

    def test_the_backward_runs_outside(self, device: str) -> None:
        # As every training loop does it: forward under autocast, backward not.
        inputs, routing = mlp_inputs(device, torch.float32)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = mlp(*inputs, routing).float().square().mean()
            inside = torch.autograd.grad(loss, inputs, retain_graph=True)
        for a, b in zip(inside, torch.autograd.grad(loss, inputs), strict=True):
            assert torch.equal(a, b)


class Experts(torch.nn.Module):
    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        for name, tensor in zip(("w_up", "b_up", "w_down", "b_down"), tensors[1:5], strict=True):
            self.register_parameter(name, torch.nn.Parameter(tensor.detach().clone()))

    def forward(self, x: Tensor, gates: Tensor, routing: scattermoe.Routing) -> Tensor:
        return mlp(x, self.w_up, self.b_up, self.w_down, self.b_down, gates, routing)


def test_functional_call(device: str) -> None:
    inputs, routing = mlp_inputs(device)
    module = Experts(inputs)
    doubled = {name: 2 * p.detach() for name, p in module.named_parameters()}
    y = torch.func.functional_call(module, doubled, (inputs[0], inputs[5], routing))
    assert torch.equal(y, mlp(inputs[0], *doubled.values(), inputs[5], routing))


def test_functional_gradients(device: str) -> None:
    inputs, routing = mlp_inputs(device)
    module = Experts(inputs)
    values = {name: p.detach() for name, p in module.named_parameters()}
    x, gates = inputs[0].detach(), inputs[5].detach()

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, values, (x, gates, routing)).square().sum()

    try:
        found = torch.func.grad(loss)(values)
    except RuntimeError as error:
        # C++ autograd functions have no functorch rule; it says so by name.
        assert "functorch" in str(error) or "torch.func" in str(error) or "setup_context" in str(error)
        return
    module(x, gates, routing).square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


def works_or_says_no(batched: Any, one_by_one: Any) -> None:
    try:
        found = batched()
    except RuntimeError as error:
        assert "vmap" in str(error) or "batching rule" in str(error) or "functorch" in str(error)
        return
    torch.testing.assert_close(found, torch.stack([one_by_one(i) for i in range(len(found))]))


@pytest.mark.filterwarnings("ignore:.*performance drop.*")
class TestVmap:
    def test_parallel_linear_over_x(self, device: str) -> None:
        routing = scattermoe.route(make_ids(4, 2, 3, "sentinels", 0).to(device), 3)
        x, weight = make((5, 4, 6), torch.float64, 1).to(device), make((3, 2, 6), torch.float64, 2).to(device)
        works_or_says_no(
            lambda: torch.vmap(lambda x: scattermoe.parallel_linear(x, weight, routing))(x),
            lambda i: scattermoe.parallel_linear(x[i], weight, routing),
        )

    def test_moe_mlp_over_weights(self, device: str) -> None:
        inputs, routing = mlp_inputs(device)
        x, w_up, _, w_down, _, gates = (t.detach() for t in inputs)
        ups = torch.stack([w_up, 2 * w_up, -w_up])
        works_or_says_no(
            lambda: torch.vmap(lambda w: scattermoe.moe_mlp(x, w, w_down, gates, routing))(ups),
            lambda i: scattermoe.moe_mlp(x, ups[i], w_down, gates, routing),
        )

    def test_combine_over_gates(self, device: str) -> None:
        routing = scattermoe.route(make_ids(4, 2, 3, "sentinels", 0).to(device), 3)
        rows, gates = make((8, 6), torch.float64, 1).to(device), make((5, 4, 2), torch.float64, 2).to(device)
        works_or_says_no(
            lambda: torch.vmap(lambda g: scattermoe.combine(rows, g, routing))(gates),
            lambda i: scattermoe.combine(rows, gates[i], routing),
        )

    def test_gating(self, device: str) -> None:
        logits = make((3, 4, 8), torch.float64, 1).to(device)
        works_or_says_no(
            lambda: torch.vmap(lambda v: scattermoe.topk_gating(v, 2)[0])(logits),
            lambda i: scattermoe.topk_gating(logits[i], 2)[0],
        )


def test_inference_mode(device: str) -> None:
    inputs, routing = mlp_inputs(device)
    with torch.inference_mode():
        for layer in (mlp, composed):
            y = layer(*inputs, routing)
            assert y.is_inference() and not y.requires_grad
            with torch.inference_mode(False):
                expected = layer(*inputs, routing)
            assert torch.equal(y, expected)
        ids = scattermoe.topk_gating(torch.randn(4, EXPERTS, device=device), 2)[1]
        assert scattermoe.route(ids, EXPERTS).slot_order.is_inference()


def test_no_grad(device: str) -> None:
    inputs, routing = mlp_inputs(device)
    with torch.no_grad():
        assert not mlp(*inputs, routing).requires_grad
        assert not composed(*inputs, routing).requires_grad


def test_anomaly_mode(device: str) -> None:
    inputs, routing = mlp_inputs(device)
    with torch.autograd.detect_anomaly(check_nan=True):
        (mlp(*inputs, routing) + composed(*inputs, routing)).sum().backward()
    assert all(t.grad is not None for t in inputs)


def test_graph_can_be_used_twice(device: str) -> None:
    inputs, routing = mlp_inputs(device)
    y = mlp(*inputs, routing) + composed(*inputs, routing)
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y.sum(), inputs), strict=True):
        assert torch.equal(a, b)


def test_changing_a_saved_tensor_is_noticed(device: str) -> None:
    for layer in (mlp, composed):
        inputs, routing = mlp_inputs(device)
        y = layer(*inputs, routing)
        with torch.no_grad():
            inputs[1].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_changing_the_routing_is_noticed(device: str) -> None:
    inputs, routing = mlp_inputs(device)
    y = mlp(*inputs, routing)
    routing.slot_order.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_and_double_use(device: str) -> None:
    inputs, routing = mlp_inputs(device)
    seen = []
    inputs[0].register_hook(lambda g: seen.append(g.shape))
    mlp(inputs[0], *inputs[1:], routing).sum().backward()
    assert seen == [inputs[0].shape]


def test_deepcopy_and_state_dict(device: str) -> None:
    inputs, routing = mlp_inputs(device)
    module = Experts(inputs)
    other = copy.deepcopy(module)
    other.load_state_dict(module.state_dict())
    x, gates = inputs[0].detach(), inputs[5].detach()
    assert torch.equal(module(x, gates, routing), other(x, gates, routing))


def test_threads_of_python(device: str) -> None:
    # The operators hold no state: calls from several threads do not meet.
    inputs, routing = mlp_inputs(device)
    expected = mlp(*inputs, routing)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: mlp(*inputs, routing), range(32)):
            assert torch.equal(y, expected)
