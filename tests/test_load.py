"""Counts of slots per expert, what is said about them, and their picture."""

import math
import statistics
import sys

import pytest
import torch

from scattermoe import expert_load, load_statistics, plot_expert_load, route
from tests.cases import ID_DTYPES, ROUTINGS, make_ids


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", ID_DTYPES)
def test_expert_load(device: str, routing: str, dtype: torch.dtype) -> None:
    ids = make_ids(37, 3, 7, routing, 1, dtype).to(device)
    want = [ids.flatten().tolist().count(e) for e in range(7)]
    load = expert_load(ids, 7)
    assert load.dtype == torch.int32 and load.tolist() == want
    assert route(ids, 7).expert_counts.tolist() == want
    assert expert_load(ids[None, :, :2, None], 7).tolist() == [ids[:, :2].flatten().tolist().count(e) for e in range(7)]
    assert expert_load(ids[:0], 7).tolist() == [0] * 7


LOADS = [[4, 4, 4, 4], [9, 5, 2, 0], [0, 0, 0, 7], [1, 0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float64])
def test_load_statistics(device: str, dtype: torch.dtype) -> None:
    got = load_statistics(torch.tensor(LOADS, device=device, dtype=dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for row, load in enumerate(LOADS):
        mean, total = statistics.fmean(load), sum(load)
        entropy = -sum(n / total * math.log(n / total) for n in load if n)
        want = (max(load) / mean, statistics.pstdev(load) / mean, entropy, math.exp(entropy), load.count(0))
        for field, value in zip(got, want, strict=True):
            assert field.shape == (4,) and field.dtype in (wide, torch.int64)
            assert field[row].item() == pytest.approx(value, rel=1e-6, abs=1e-7)
    assert load_statistics(torch.tensor([3], device=device)).variation.item() == 0


def test_no_load_is_even_and_nan_passes() -> None:
    none = load_statistics(torch.zeros(4, dtype=torch.int32))
    assert [field.item() for field in none] == pytest.approx([1, 0, math.log(4), 4, 4])
    for field in load_statistics(torch.tensor([1.0, math.nan]))[:4]:
        assert field.isnan()


def test_statistics_compile(device: str, fresh_compiler: None) -> None:
    compiled = torch.compile(lambda ids: load_statistics(expert_load(ids, 5)), fullgraph=True, backend="aot_eager")
    ids = make_ids(30, 2, 5, "sentinels", 1).to(device)
    torch.testing.assert_close(compiled(ids), load_statistics(expert_load(ids, 5)))


def test_plot(tmp_path, device: str) -> None:
    pytest.importorskip("matplotlib")
    load = torch.tensor(LOADS, device=device)
    figure = plot_expert_load({"attention": load, "mlp": load[:1, :2]}, title="two kinds")
    panels = figure.axes[:2]
    assert [panel.get_title() for panel in panels] == ["attention", "mlp"]
    drawn = panels[0].images[0].get_array()
    assert drawn.tolist() == [[n / (sum(row) / 4) for n in row] for row in LOADS]
    crosses = panels[0].lines[0].get_xydata().tolist()
    assert crosses == [[e, layer] for layer, row in enumerate(LOADS) for e, n in enumerate(row) if n == 0]
    figure.savefig(tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 1000

    (panel, _) = plot_expert_load(load[1].bfloat16(), labels=["only"]).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["only"]
    assert len(plot_expert_load(torch.zeros(2, 3)).axes[0].lines[0].get_xydata()) == 6


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        plot_expert_load(torch.ones(2, 3))


def test_bad_input() -> None:
    load = torch.ones(2, 3)
    with pytest.raises(ValueError, match="num_experts >= 1, got 0"):
        expert_load(torch.zeros(2, dtype=torch.long), 0)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=f"integer dtype, got {dtype}"):
            expert_load(torch.zeros(2, dtype=dtype), 3)
    for shape in ((), (2, 0)):
        with pytest.raises(ValueError, match="at least one expert"):
            load_statistics(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\[layers, experts\], got \[1, 2, 3\] of 'x'"):
        plot_expert_load({"x": load[None]})
    with pytest.raises(ValueError, match="labels as layers, got 1 and 2"):
        plot_expert_load(load, labels=["a"])
    with pytest.raises(ValueError, match="at least one entry, got none"):
        plot_expert_load({})
