"""``python -m scattermoe``: what is installed, and whether it computes right on this machine."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

import torch

import scattermoe
from scattermoe import _library, selfcheck
from scattermoe.launches import code_arch

# A layer whose products are large enough to fill a GPU.
_TYPICAL = {"num_tokens": 8192, "top_k": 8, "num_experts": 64, "hidden_size": 2048, "intermediate_size": 1024}


def _kernel_lines(device: str) -> list[str]:
    """What a typical mixture of experts launches on a device, and the one product that other dtypes and sizes change."""
    lines = [f"moe_mlp, bfloat16, {', '.join(f'{name} {size}' for name, size in _TYPICAL.items())}"]
    for backward in (False, True):
        launches = scattermoe.explain("moe_mlp", dtype="bfloat16", device=device, backward=backward, **_TYPICAL)
        lines += [f"  {'backward' if backward else 'forward'}", *(f"    {launch}" for launch in launches)]
    if device != "cpu":
        lines.append("the first product elsewhere")
        for name, changes in (
            ("8 tokens", {"num_tokens": 8}),
            ("float32", {"dtype": "float32"}),
            ("float64", {"dtype": "float64"}),
        ):
            first = scattermoe.explain("moe_mlp", device=device, **{**_TYPICAL, "dtype": "bfloat16", **changes})[0]
            lines.append(f"    {name}, {first}")
    return lines


def _device_lines(info: dict) -> list[str]:
    """The devices of this machine, with the code that runs on them."""
    lines = [f"cpu, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        name = f"cuda:{index}, {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
        arch = code_arch(info["cuda_archs"], 10 * major + minor)
        if not info["cuda"]:
            code = "no kernels: this is a build for the CPU only"
        elif arch is None:
            code = f"no kernels for it: build again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        else:
            code = f"code compiled for sm_{arch}"
        lines.append(f"{name}: {code}")
    return lines


def _report(info: dict) -> None:
    package = Path(scattermoe.__file__).parent
    cuda = f"CUDA {info['cuda']} for {' '.join(info['cuda_archs'])}" if info["cuda"] else "CPU only"
    print(f"scattermoe {info['version']} in {package}")
    print(f"  built      {cuda}; {info['compiler']}, {info['flags']}; against PyTorch {info['torch']}")
    print(f"  running    PyTorch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    for index, line in enumerate(_device_lines(info)):
        print(f"  {'' if index else 'devices':<10} {line}")
    print("  kernels    python -m scattermoe --explain DEVICE, with cpu, cuda or an architecture such as sm_90")


def _check(device: str) -> bool:
    """Prints one line an operator and tensor, and returns whether all are within their bounds."""
    print(f"\nSelf-check on {device}: largest per-row relative error against per-token loops in float64 (bound)\n")
    names = [str(dtype).removeprefix("torch.") for dtype in selfcheck.DTYPES]
    print(f"  {'':<32}" + "".join(f"{name:>19}" for name in names))
    started = time.perf_counter()
    rows: dict[tuple[str, str], dict[str, selfcheck.Result]] = {}
    for result in selfcheck.run(device):
        rows.setdefault((result.op, result.tensor), {})[str(result.dtype).removeprefix("torch.")] = result
    for (op, tensor), results in rows.items():
        cells = []
        for name in names:
            result = results.get(name)
            if result is None or result.problem:
                cells.append("-" if result is None else "FAILED")
            else:
                mark = "" if result.passed else "FAILED "
                exact = result.passed and result.bound == 0
                cells.append("exact" if exact else f"{mark}{result.error:.1e} ({result.bound:.0e})")
        print(f"  {op + ' ' + tensor:<32}" + "".join(f"{cell:>19}" for cell in cells))
    results = [result for row in rows.values() for result in row.values()]
    failed = [result for result in results if not result.passed]
    for result in failed:
        if result.problem:
            print(f"  {result.op}, {result.dtype}: {result.problem}")
    seconds = time.perf_counter() - started
    print(f"\n{len(results) - len(failed)} of {len(results)} comparisons within bounds, {seconds:.1f} s")
    return not failed


def main() -> int:
    """Prints the report and the self-check; returns the exit status, 1 when a check failed."""
    parser = argparse.ArgumentParser(prog="python -m scattermoe", description=__doc__)
    parser.add_argument(
        "--device", action="append", help="a device to check (default: the CPU, and CUDA if built and there)"
    )
    parser.add_argument("--no-check", action="store_true", help="only report what is installed")
    parser.add_argument(
        "--explain", metavar="DEVICE", help="only print the kernels of a typical layer on cpu, cuda or, say, sm_90"
    )
    parser.add_argument(
        "--cmake-prefix-path", action="store_true", help="only print where find_package(scattermoe) looks"
    )
    arguments = parser.parse_args()
    if arguments.cmake_prefix_path:
        print(Path(scattermoe.__file__).resolve().parent)
        return 0
    if arguments.explain:
        try:
            print("\n".join(_kernel_lines(arguments.explain)))
        except ValueError as error:
            parser.error(str(error))
        return 0
    info = _library.load().build_info()
    _report(info)
    if arguments.no_check:
        return 0
    devices = arguments.device or ["cpu"] + (["cuda"] if info["cuda"] and torch.cuda.is_available() else [])
    results = [_check(device) for device in devices]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
