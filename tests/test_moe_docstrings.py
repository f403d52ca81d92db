"""The examples in the modules' docstrings, run as they stand."""

import doctest
import importlib

import pytest
import torch

MODULES = [
    "activations",
    "assignment",
    "attention",
    "cache",
    "experts",
    "load",
    "losses",
    "mlp",
    "moe",
    "parallel_experts",
    "rotary",
    "router",
    "transformers.experts",
    "transformers.rules",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    module = importlib.import_module(f"scattermoe.{name}")
    runner = doctest.DocTestRunner()
    examples = 0
    for test in doctest.DocTestFinder().find(module, name, globs={}):
        test.globs = {}  # an example brings its own imports
        torch.manual_seed(0)
        examples += len(test.examples)
        runner.run(test)
    assert examples and runner.failures == 0
