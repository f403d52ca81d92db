"""The installed library as a C++ user gets it: find_package, link, call; no Python in the process.

Compiling against PyTorch's headers is slow, so each test builds its programs once and looks at all of them.
"""

import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import scattermoe

ROOT = Path(__file__).parents[1]
PACKAGE = Path(scattermoe.__file__).resolve().parent
BIN = Path(sys.executable).parent
CMAKE = shutil.which("cmake", path=str(BIN)) or shutil.which("cmake")
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(CMAKE is None or COMPILER is None, reason="needs cmake and a C++ compiler")


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command with the programs of this Python first."""
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(PACKAGE.parent),
        "CMAKE_BUILD_PARALLEL_LEVEL": "2",
        # Test processes run side by side: threads that spin while they wait would slow each other down.
        "OMP_WAIT_POLICY": "passive",
    }
    if shutil.which("ccache"):
        # The folders of the next run have other names.
        environment |= {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache", "CCACHE_BASEDIR": tempfile.gettempdir()}
    return subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
    )


def run_checked(*command: str | Path, cwd: Path | None = None) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def site_packages(tmp_path: Path) -> Path:
    """A copy of the installed package, elsewhere and beside PyTorch, as site-packages has them."""
    folder = tmp_path / "site packages"
    for part in ("include", "lib", "share"):
        shutil.copytree(PACKAGE / part, folder / "scattermoe" / part)
    (folder / "torch").symlink_to(Path(torch.__file__).parent)
    return folder


def test_programs(site_packages: Path, tmp_path: Path) -> None:
    build = tmp_path / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={site_packages / 'scattermoe'}"
    run_checked(CMAKE, "-S", ROOT / "tests" / "cpp", "-B", build, prefix)
    run_checked(CMAKE, "--build", build)
    for program in ("functions", "registered"):
        assert run_checked(build / program).strip() == "ok"


def test_another_pytorch_is_refused_in_one_sentence(site_packages: Path, tmp_path: Path) -> None:
    other = tmp_path / "torch"
    (other / "include" / "torch").mkdir(parents=True)
    (other / "include" / "torch" / "library.h").touch()
    (other / "version.py").write_text("__version__ = '2.99.0+cpu'\n")
    done = run(
        CMAKE,
        *("-S", ROOT / "tests" / "cpp", "-B", tmp_path / "build"),
        f"-DCMAKE_PREFIX_PATH={site_packages / 'scattermoe'}",
        f"-DSCATTERMOE_TORCH_DIR={other}",
    )
    assert done.returncode != 0
    assert re.search(r"built for PyTorch 2\.\d+\S* and\s+this is PyTorch\s+2\.99\.0", done.stdout), done.stdout


def test_commands_of_the_page(tmp_path: Path) -> None:
    """The commands of docs/cpp.md in their order, and what the example programs print and write."""
    shutil.copytree(ROOT / "examples" / "cpp", tmp_path / "examples" / "cpp")
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "cpp.md").read_text(), re.DOTALL)
    commands = [command for block in blocks for command in block.splitlines()]
    forms = ["aoti", "export", "trace"]
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as symbols:
        if symbols.find(b"torch8nativert17ModelRunnerHandle") < 0:
            commands = [command for command in commands if "/layer.pt2 " not in command]
            forms.remove("export")
    printed = {command: run_checked("bash", "-ec", command, cwd=tmp_path) for command in commands}

    rows = [[float(number) for number in line.split()] for line in printed["build/cpp/train"].splitlines()[1:]]
    losses = [row[1] for row in rows]
    assert len(rows) == 9 and losses[0] > 0.3 and losses[-1] < 0.05
    for row in rows:
        assert len(row) == 2 + 8 and sum(row[2:]) == pytest.approx(100, abs=5)

    layer = tmp_path / "build" / "cpp" / "layer"
    expected = torch.load(layer / "expected.pt")
    for form in forms:
        torch.testing.assert_close(torch.load(layer / f"y_{form}.pt"), expected)
