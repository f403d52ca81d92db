"""The installed library as a C++ user gets it: find_package, link, call; no Python in the process."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import scattermoe

CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled programs of tests/cpp."""
    if CMAKE is None:
        pytest.skip("needs cmake")
    build = tmp_path_factory.mktemp("cpp")
    package = Path(scattermoe.__file__).resolve().parent
    for command in (
        [
            f"-S{Path(__file__).parent / 'cpp'}",
            f"-B{build}",
            f"-DCMAKE_PREFIX_PATH={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ],
        ["--build", str(build), "--parallel", "2"],
    ):
        done = subprocess.run([CMAKE, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
    return build


@pytest.mark.parametrize("program", ["typed", "registered"])
def test_program(programs: Path, program: str) -> None:
    done = subprocess.run([programs / program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.strip() == "ok"
