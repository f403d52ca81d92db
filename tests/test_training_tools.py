"""The tools of a training loop around a whole model of sparse blocks: they must not change what is computed."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import checkpoint

import scattermoe
from scattermoe import lora
from tests.modes import Calls
from tests.processes import run_processes

VOCABULARY, HIDDEN, LENGTH = 32, 16, 6
PROCESSES = 2
DEADLINE = 120  # seconds until processes that wait for each other are ended

# Said by every checkpoint that one process writes or reads by itself.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Wrap = Callable[..., tuple[Tensor, Tensor]]


def call(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return block(x)


class Block(nn.Module):
    """Both of the library's layers, with every kind of parameter they have."""

    def __init__(self) -> None:
        super().__init__()
        options = {"balance": "sequence", "router_bias": True, "init_std": 0.3}
        self.attention_norm = nn.RMSNorm(HIDDEN)
        self.attention = scattermoe.MixtureOfAttention(HIDDEN, 4, 2, 2, 8, bias=True, expert_bias=True, **options)
        self.mlp_norm = nn.RMSNorm(HIDDEN)
        self.mlp = scattermoe.MoE(
            *(HIDDEN, 12, 5, 2),
            bias=True,
            scoring="sigmoid",
            selection_bias=True,
            shared_intermediate_size=8,
            shared_gate=True,
            **options,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attended, attention_aux = self.attention(self.attention_norm(x))
        x = x + attended
        transformed, mlp_aux = self.mlp(self.mlp_norm(x))
        return x + transformed, attention_aux.load_balancing_loss + attention_aux.z_loss + mlp_aux.z_loss


class Model(nn.Module):
    """Predicts the next token; `wrap` is how a block is called."""

    def __init__(self, wrap: Wrap = call) -> None:
        super().__init__()
        self.wrap = wrap
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss: a mean over sequences in each of its terms, so that parts of a batch average to the batch."""
        x = self.embedding(tokens[:, :-1])
        router_losses = x.new_zeros(())
        for block in self.blocks:
            x, router_loss = self.wrap(block, x)
            router_losses = router_losses + router_loss
        logits = self.head(x).flatten(0, 1)
        return F.cross_entropy(logits.to(router_losses.dtype), tokens[:, 1:].flatten()) + 0.1 * router_losses


def build(device: str = "cpu", dtype: torch.dtype = torch.float64, wrap: Wrap = call) -> Model:
    """The same weights in every process, every call and (rounded) every dtype."""
    torch.manual_seed(1)
    return Model(wrap).to(device, dtype)


def adapted() -> Model:
    """The same model with adapters, as after training."""
    model = build()
    lora.add_adapters(model, r=2)
    for parameter in lora.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def batch(device: str = "cpu", sequences: int = 4) -> Tensor:
    return torch.randint(VOCABULARY, (sequences, LENGTH + 1), generator=torch.Generator().manual_seed(2)).to(device)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in found.values()), "every parameter takes part"
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], exact: bool = False) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        if exact:
            assert torch.equal(found[name], grad), name
        else:
            torch.testing.assert_close(found[name], grad, msg=lambda text, name=name: f"{name}: {text}")


# ---- One process -----------------------------------------------------------------------------------------------------


def test_autocast_with_master_weights(device: str) -> None:
    model, tokens = build(device, torch.float32), batch(device)
    model(tokens).backward()
    exact = gradients(model)
    model.zero_grad()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = model(tokens)
    loss.backward()
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32
        # A rounded activation may choose another expert, never most of them.
        assert F.cosine_similarity(grad.flatten(), exact[name].flatten(), dim=0) > 0.9, name
    # Steps that bfloat16 weights would round away are kept.
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=1e-5).step()
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_loss_scaling(device: str) -> None:
    """float16 with a GradScaler: the scale leaves the step, and a step with an overflow is left out."""
    model, tokens = build(device, torch.float32), batch(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    losses = []
    for step in range(12):
        optimiser.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast(device, dtype=torch.float16):
            loss = model(tokens)
        scaler.scale(loss * (float("inf") if step == 3 else 1)).backward()
        scaler.step(optimiser)
        scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == (step == 3)
        losses.append(loss.item())
    assert scaler.get_scale() == 2.0**9
    assert losses[-1] < losses[0] - 0.2


KEPT = ("parallel_linear", "_moe_mlp_forward")


def keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
    policy = checkpoint.CheckpointPolicy
    kept = op.namespace == "scattermoe" and op._opname in KEPT
    return policy.MUST_SAVE if kept else policy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "non_reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(checkpoint.create_selective_checkpoint_contexts, keep_products),
    },
}


@pytest.mark.parametrize("autocast", [False, True], ids=["float64", "autocast"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpointed_blocks(device: str, kind: str, autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.float64
    results, products = [], []
    for wrap in (call, lambda block, x: checkpoint.checkpoint(block, x, **CHECKPOINTS[kind])):
        model = build(device, dtype, wrap)
        context = torch.autocast(device, dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
        with Calls() as calls:
            with context:
                loss = model(batch(device))
            loss.backward()
        results.append(gradients(model))
        products.append(sum(calls.count(name) for name in ("moe_mlp", *KEPT)))
    assert_same_gradients(results[1], results[0], exact=True)
    assert products[1] == (products[0] if kind == "selective" else 2 * products[0])


def test_accumulated_gradients_are_the_big_batch(device: str) -> None:
    model, tokens = build(device), batch(device)
    model(tokens).backward()
    expected = gradients(model)
    model.zero_grad()
    for part in tokens.split(1):
        (model(part) / 4).backward()
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_fused_and_foreach_optimisers(device: str, optimiser: type[torch.optim.Optimizer], kind: str) -> None:
    results = []
    for options in ({"foreach": False, "fused": False}, {kind: True}):
        model = build(device)
        if optimiser is torch.optim.SGD:
            options["momentum"] = 0.9
        steps = optimiser(model.parameters(), lr=0.05, weight_decay=0.1, **options)
        for _ in range(3):
            steps.zero_grad()
            model(batch(device)).backward()
            for name, p in model.named_parameters():
                # Other strides take these implementations off their fast path.
                assert p.grad.stride() == p.stride(), name
            steps.step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_moving_average_of_the_weights(device: str) -> None:
    model = build(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = None
    for _ in range(3):
        optimiser.zero_grad()
        model(batch(device)).backward()
        optimiser.step()
        for block in model.blocks:
            block.mlp.update_selection_bias(torch.tensor([9, 1, 1, 1, 3], device=device), rate=0.01)
        average.update_parameters(model)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        expected = state if expected is None else {n: 0.75 * v + 0.25 * state[n] for n, v in expected.items()}
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    # The same weights lent to the model that is trained, and in a copy of it.
    loss = torch.func.functional_call(model, dict(average.module.state_dict()), (batch(device),))
    assert torch.equal(loss, average(batch(device)))
    twin = copy.deepcopy(average)
    assert torch.equal(loss, twin(batch(device)))
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in average.parameters()}


def test_safetensors(device: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = build(device, torch.bfloat16), Model().to(device, torch.bfloat16)
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    loaded = safetensors.load_file(tmp_path / "model.safetensors", device=device)
    assert loaded.keys() == model.state_dict().keys()
    safetensors.load_model(other, str(tmp_path / "model.safetensors"), device=device)
    assert torch.equal(other(batch(device)), model(batch(device)))


# ---- Several processes -----------------------------------------------------------------------------------------------


def shard(model: Model, **options: Any) -> Model:
    """FSDP2 as one uses it: every block, and within it the experts, gathered by themselves."""
    for block in model.blocks:
        fully_shard(block.attention.experts, **options)
        register_fsdp_forward_method(block.attention.experts, "queries")
        fully_shard(block.mlp.experts, **options)
        fully_shard(block, **options)
    return fully_shard(model, **options)


def whole(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: grad.full_tensor() for name, grad in gradients.items()}


def work(rank: int, folder: Path) -> None:
    """What each of the processes does; rank 0 leaves the results in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    part = batch().chunk(PROCESSES)[rank]
    results: dict[str, Any] = {}

    replicated = DistributedDataParallel(build())
    replicated(part).backward()
    results["ddp"] = gradients(replicated)

    sharded = shard(build(), mesh=mesh)
    optimiser = torch.optim.AdamW(sharded.parameters(), lr=0.05, foreach=True)
    sharded(part).backward()
    results["fsdp"] = whole(gradients(sharded))
    optimiser.step()
    results["fsdp, a step"] = {name: p.full_tensor() for name, p in sharded.named_parameters()}
    dcp.save({"model": get_model_state_dict(sharded)}, checkpoint_id=folder / "from_two")

    checkpointed = shard(build(wrap=functools.partial(checkpoint.checkpoint, use_reentrant=False)), mesh=mesh)
    checkpointed(part).backward()
    results["fsdp, checkpointed"] = whole(gradients(checkpointed))

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    narrow = shard(build(dtype=torch.float32), mesh=mesh, mp_policy=policy)
    narrow(part).backward()
    results["fsdp, bfloat16"] = whole(gradients(narrow))

    fine_tuned = shard(adapted(), mesh=mesh)
    fine_tuned(part).backward()
    assert all(p.grad is None for p in fine_tuned.parameters() if not p.requires_grad)
    results["fsdp, lora"] = whole({n: p.grad for n, p in fine_tuned.named_parameters() if p.requires_grad})

    state = {"model": get_model_state_dict(sharded)}
    dcp.load(state, checkpoint_id=folder / "from_one")
    set_model_state_dict(sharded, state["model"])
    results["loaded"] = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in sharded.state_dict().items()
    }
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Runs `work` in two processes that talk through a file and gloo."""
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(7)
    dcp.save({"model": Model().double().state_dict()}, checkpoint_id=folder / "from_one", no_dist=True)
    run_processes(work, (folder,), PROCESSES, DEADLINE)
    yield folder, torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """The gradients of one process with the whole batch."""
    model = build()
    model(batch()).backward()
    return gradients(model)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp, checkpointed"])
def test_gradients_of_two_processes(
    processes: tuple[Path, dict[str, Any]], alone: dict[str, Tensor], kind: str
) -> None:
    assert_same_gradients(processes[1][kind], alone)


def test_adapters_of_two_processes(processes: tuple[Path, dict[str, Any]]) -> None:
    model = adapted()
    model(batch()).backward()
    names = list(lora.adapter_state_dict(model))
    assert_same_gradients(processes[1]["fsdp, lora"], {name: model.get_parameter(name).grad for name in names})


def test_sharded_step(processes: tuple[Path, dict[str, Any]], alone: dict[str, Tensor]) -> None:
    model = build()
    for name, p in model.named_parameters():
        p.grad = alone[name]
    torch.optim.AdamW(model.parameters(), lr=0.05).step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            processes[1]["fsdp, a step"][name], p.data, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_sharded_in_bfloat16(processes: tuple[Path, dict[str, Any]], alone: dict[str, Tensor]) -> None:
    found = processes[1]["fsdp, bfloat16"]
    assert found.keys() == alone.keys()
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        assert F.cosine_similarity(grad.flatten().double(), alone[name].flatten(), dim=0) > 0.9, name


def test_checkpoint_of_two_processes_loads_into_one(processes: tuple[Path, dict[str, Any]]) -> None:
    folder, results = processes
    torch.manual_seed(8)
    state = {"model": Model().double().state_dict()}
    dcp.load(state, checkpoint_id=folder / "from_two", no_dist=True)
    stepped = results["fsdp, a step"]
    assert stepped.keys() == dict(Model().named_parameters()).keys()
    for name, value in stepped.items():
        assert torch.equal(state["model"][name], value), name


def test_checkpoint_of_one_process_loads_into_two(processes: tuple[Path, dict[str, Any]]) -> None:
    torch.manual_seed(7)
    expected, found = Model().double().state_dict(), processes[1]["loaded"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
