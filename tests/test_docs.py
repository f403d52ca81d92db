"""README and docs are programs: their Python runs, and the commands they name exist.

The blocks of a page under docs/ follow each other in one namespace, as they are read; those of the README stand alone.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
OPTIONAL = ("transformers", "matplotlib")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of one language, each with the number of its first line."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in found]


def run(page: Path, line: int, source: str, namespace: dict) -> None:
    for module in OPTIONAL:
        if re.search(rf"^\s*(import|from) (\w+\.)?{module}\b", source, re.MULTILINE):
            pytest.importorskip(module)
    # Empty lines before it give the block the line numbers that it has on its page.
    exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)


@pytest.mark.parametrize("index", range(len(blocks(README, "python"))))
def test_readme_example(index: int) -> None:
    run(README, *blocks(README, "python")[index], {"__name__": "readme"})


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python")], ids=lambda page: page.stem)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a page may write files
    namespace = {"__name__": page.stem}
    for line, source in blocks(page, "python"):
        run(page, line, source, namespace)


def commands() -> list[tuple[str, str]]:
    """Every command line of the documentation that starts a program of this repository or a target of its Makefile."""
    lines = [
        (page.name, line.partition(" #")[0])
        for page in PAGES
        for language in ("bash", "sh", "console")
        for _, source in blocks(page, language)
        for line in source.replace("\\\n", " ").splitlines()
    ]
    return [(page, line) for page, line in lines if re.search(r"\bpython3? \S+\.py\b|^\$? ?make ", line)]


@pytest.mark.parametrize("page, command", commands())
def test_command_exists(page: str, command: str) -> None:
    script = re.search(r"\bpython3? (\S+\.py)\b(.*)", command)
    if script is None:
        target = command.split("make ", 1)[1].split()[0]
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    source = (ROOT / script.group(1)).read_text()
    for option in re.findall(r"(?<=\s)--[\w-]+", script.group(2)):
        assert f'"{option}"' in source, option


def test_quick_start_is_short() -> None:
    assert len(blocks(README, "python")[0][1].splitlines()) <= 20
