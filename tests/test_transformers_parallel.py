"""transformers' own expert and tensor parallelism over two processes, on our experts: the numbers of one process."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.distributed.tensor import DTensor

transformers = pytest.importorskip("transformers")

import scattermoe.transformers  # noqa: E402, F401  (registers itself, after the check that transformers is there)
from tests import parity  # noqa: E402
from tests.modes import Calls  # noqa: E402
from tests.tolerances import model_bound, relative_error  # noqa: E402

PROCESSES = 2
DEADLINE = 180  # seconds until processes that wait for each other are ended
# Expert parallelism gives each process half of the experts, tensor parallelism half of every expert.
CASES = [("mixtral", "experts"), ("gpt_oss", "experts"), ("mixtral", "tensors")]


def whole(name: str, gradient: Tensor) -> Tensor:
    """A parameter's gradient out of the parts that the processes have."""
    if not isinstance(gradient, DTensor):
        return gradient
    local, full = gradient.to_local(), gradient.shape
    if not name.endswith("gate_up_proj") or local.shape[0] != full[0]:
        return gradient.full_tensor()
    # Each process has some rows of the gates, and as many of the ups.
    parts = [torch.empty_like(local) for _ in range(PROCESSES)]
    dist.all_gather(parts, local.contiguous())
    gates, ups = zip(*(part.chunk(2, dim=1) for part in parts), strict=True)
    return torch.cat((*gates, *ups), dim=1)


def step(folder: Path, name: str, kind: str) -> dict[str, Any]:
    """What one process sees of a training step."""
    from transformers.distributed import DistributedConfig

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / name,
        attn_implementation="eager",
        experts_implementation="scattermoe",
        distributed_config=DistributedConfig(tp_size=PROCESSES, enable_expert_parallel=kind == "experts"),
    )
    inputs = parity.batch(model, "left")
    with Calls() as calls:
        output = model(**inputs)
        output.loss.backward()
    dropped = [int((args[0] >= args[1]).sum()) for operator, args in calls.seen if operator == "group_by_expert"]
    gradients = {key: whole(key, parameter.grad) for key, parameter in model.named_parameters()}
    return {"logits": output.logits[inputs["attention_mask"] == 1].detach(), "dropped": dropped, "gradients": gradients}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=PROCESSES)
    torch.save({case: step(folder, *case) for case in CASES}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[tuple[str, str], dict[str, Any]]]]:
    """The steps of every process, which talk through a file and gloo."""
    folder = tmp_path_factory.mktemp("processes")
    for name in {name for name, _ in CASES}:
        parity.build(name).save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # transformers would give every process a GPU of its own
        running = multiprocessing.spawn(work, (folder,), nprocs=PROCESSES, join=False)
    deadline = time.monotonic() + DEADLINE
    try:
        while not running.join(timeout=1):
            assert time.monotonic() < deadline, f"the processes wait for each other after {DEADLINE} s"
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()
    yield [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("name, kind", CASES)
def test_two_processes_are_one(processes: list[dict], name: str, kind: str) -> None:
    model = parity.build(name)
    alone = parity.training_step(model, parity.batch(model, "left"))
    limit = model_bound(model.config.hidden_size, model.config.num_hidden_layers)
    for seen in (of_rank[name, kind] for of_rank in processes):
        assert relative_error(seen["logits"], alone.logits) <= limit
        assert seen["gradients"].keys() == alone.gradients.keys()
        for key, gradient in alone.gradients.items():
            assert relative_error(seen["gradients"][key], gradient) <= limit, key
    slots = 3 * 11 * model.config.num_experts_per_tok
    dropped = torch.tensor([of_rank[name, kind]["dropped"] for of_rank in processes])
    if kind == "experts":  # what one process leaves out, the other computes
        assert (dropped.sum(0) == slots).all() and (dropped > 0).all()
    else:
        assert not dropped.any()
