"""transformers' own expert and tensor parallelism over two processes, on our experts: the numbers of one process."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

transformers = pytest.importorskip("transformers")

import scattermoe.transformers  # noqa: E402, F401  (registers itself, after the check that transformers is there)
from tests import parity  # noqa: E402
from tests.modes import Calls  # noqa: E402
from tests.processes import run_processes  # noqa: E402
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

    options: dict[str, Any] = {"enable_expert_parallel": True}
    if hasattr(DistributedConfig, "ep_size"):  # newer versions have a size of its own for it, and ways to do it
        options = {"ep_size": PROCESSES, "ep_implementation": "all_reduce"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / name,
        attn_implementation="eager",
        experts_implementation="scattermoe",
        distributed_config=DistributedConfig(tp_size=PROCESSES, **(options if kind == "experts" else {})),
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


# One test, so that the processes are started once whatever shares the tests out.
def test_two_processes_are_one(tmp_path: Path) -> None:
    for name in {name for name, _ in CASES}:
        parity.build(name).save_pretrained(tmp_path / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # transformers would give every process a GPU of its own
        run_processes(work, (tmp_path,), PROCESSES, DEADLINE)
    processes = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    for case in CASES:
        compare(*case, [of_rank[case] for of_rank in processes])


def compare(name: str, kind: str, seen: list[dict[str, Any]]) -> None:
    """The step of every process against that of one process alone."""
    model = parity.build(name)
    alone = parity.training_step(model, parity.batch(model, "left"))
    limit = model_bound(model.config.hidden_size, model.config.num_hidden_layers)
    for rank, of_rank in enumerate(seen):
        errors = {key: relative_error(of_rank["gradients"][key], value) for key, value in alone.gradients.items()}
        errors["logits"] = relative_error(of_rank["logits"], alone.logits)
        wrong = {key: error for key, error in errors.items() if not error <= limit}
        assert not wrong, f"{name}, {kind}, process {rank}: relative errors above {limit:.3g}: {wrong}"
    slots = 3 * 11 * model.config.num_experts_per_tok
    dropped = torch.tensor([of_rank["dropped"] for of_rank in seen])
    if kind == "experts":  # what one process leaves out, the other computes
        assert (dropped.sum(0) == slots).all() and (dropped > 0).all()
    else:
        assert not dropped.any()
