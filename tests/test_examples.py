"""Every example runs from its command line, and a resumed training run is the run it resumes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name: str, *arguments: str) -> str:
    """Runs an example as a user does; returns what it printed."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        # Test processes run side by side: threads that spin while they wait would slow each other down.
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(folder: Path, *arguments: str) -> str:
    """A training run cut short to a few seconds."""
    short = ("--held-out", "512", "--sample", "8", "--device", "cpu")
    return run_example("train.py", "--out", str(folder), *short, *arguments)


def test_quickstart():
    assert "fused MLP: (512, 256)" in run_example("quickstart.py")


def test_swap_into_model():
    assert "the same numbers" in run_example("swap_into_model.py")


def test_finetune_transformers(tmp_path):
    pytest.importorskip("transformers")
    short = ("--batch-size", "2", "--length", "32", "--device", "cpu", "--save", str(tmp_path))
    printed = run_example("finetune_transformers.py", "--steps", "4", *short)
    assert "on grouped_mm" in printed and "tokens per second" in printed
    printed = run_example("finetune_transformers.py", "--steps", "1", "--model", str(tmp_path), *short)
    assert "on scattermoe" in printed


def test_lora(tmp_path):
    saved = tmp_path / "adapters.pt"
    short = ("--base-steps", "1", "--steps", "2", "--device", "cpu", "--save", str(saved))
    printed = run_example("lora.py", *short)
    assert "merged" in printed and "it is the base model, bit by bit" in printed
    adapters = torch.load(saved, weights_only=True)
    assert len(adapters) == 16 and all(".lora." in name for name in adapters)


@pytest.mark.parametrize(
    "arguments",
    [("--preset", "switch", "--dtype", "bfloat16"), ("--preset", "universal")],
    ids=["switch-bfloat16", "universal"],
)
def test_train_preset(tmp_path, arguments):
    printed = train(tmp_path, "--steps", "1", *arguments)
    assert "this model" in printed and "byte bigrams" in printed and "a sample" in printed
    for name in ("loss.png", "expert_load.png", "sample.txt", "checkpoint.pt"):
        assert (tmp_path / name).stat().st_size > 0


def test_train_resumes_the_same_curve(tmp_path):
    train(tmp_path / "whole", "--steps", "3")
    stopped = train(tmp_path / "parts", "--steps", "3", "--stop-at", "1")
    assert "go on with --resume" in stopped
    train(tmp_path / "parts", "--resume")
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 3
    assert whole["history"] == parts["history"]
    for name, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][name]), name
