"""The examples of the README are programs: they have to run."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_readme_example(index: int) -> None:
    if "transformers" in BLOCKS[index]:
        pytest.importorskip("transformers")
    exec(compile(BLOCKS[index], f"README.md, example {index + 1}", "exec"), {"__name__": "readme"})


def test_quick_start_is_short() -> None:
    assert len(BLOCKS[0].splitlines()) <= 20
