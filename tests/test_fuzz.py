"""The first cases of the fuzzer, and the fuzzer itself."""

import pytest
import torch

import scattermoe
from tests import fuzz
from tests.cases import Combine, Gating, Linear, Mlp

BATCH = 20


@pytest.mark.parametrize("first", range(0, 200, BATCH))
def test_cases(device: str, first: int) -> None:
    failures = [fuzz.failure(seed, device) for seed in range(first, first + BATCH)]
    assert not any(failures), "\n".join(f for f in failures if f)


def test_every_kind_of_case_is_drawn() -> None:
    cases = [fuzz.draw(seed, "cpu") for seed in range(500)]
    assert {type(c) for c in cases} == {Linear, Combine, Mlp, Gating}
    mlps = [c for c in cases if isinstance(c, Mlp)]
    assert len({c.activation for c in mlps}) == 11
    assert {c.dtype for c in mlps} == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    assert len({c.grads for c in mlps}) > 10


def test_a_seed_is_a_case() -> None:
    assert repr(fuzz.draw(7, "cpu")) == repr(fuzz.draw(7, "cpu"))
    assert repr(fuzz.draw(7, "cpu")) != repr(fuzz.draw(8, "cpu"))


def test_a_failure_prints_its_reproduction(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seed = next(s for s in range(100) if isinstance(fuzz.draw(s, "cpu"), Combine) and fuzz.draw(s, "cpu").tokens > 1)
    right = scattermoe.combine
    monkeypatch.setattr(scattermoe, "combine", lambda *args, **kwargs: right(*args, **kwargs) + 1)
    assert fuzz.main(["--seed", str(seed), "--cases", "1", "--device", "cpu"]) == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert f"python -m tests.fuzz --seed {seed} --cases 1 --device cpu" in line
    monkeypatch.undo()
    assert fuzz.main(["--seed", str(seed), "--cases", "1", "--device", "cpu"]) == 0
