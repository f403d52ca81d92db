"""The examples in the package's docstrings, run as they stand; what is public has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import scattermoe

# __main__ runs when it is imported, _C is no Python.
MODULES = [
    module.name
    for module in pkgutil.walk_packages(scattermoe.__path__, "scattermoe.")
    if module.name.rpartition(".")[2] not in ("__main__", "_C")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    for part, needed in (("transformers", "transformers"), ("load", "matplotlib")):
        if part in name.split("."):
            pytest.importorskip(needed)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(module, name, globs={}):
        test.globs = {}  # an example brings its own imports
        torch.manual_seed(0)
        runner.run(test)
    assert runner.failures == 0


@pytest.mark.parametrize("name", scattermoe.__all__)
def test_public_names_have_an_example(name: str) -> None:
    value = getattr(scattermoe, name)
    # Other classes are what a function returns or raises, and its own example shows them.
    if inspect.isfunction(value) or (isinstance(value, type) and issubclass(value, torch.nn.Module)):
        assert ">>>" in value.__doc__
