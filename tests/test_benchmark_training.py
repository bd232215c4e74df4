"""The training benchmark: who takes part, and its arithmetic under a clock that the test holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from benchmarks import training
from benchmarks.training import WARM_UP, Contender, contenders, measure


class Watch:
    """A clock that goes on only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr(training, "time", watch)
    return watch


@pytest.fixture
def model() -> Any:
    return timm.create_model("test_vit", depth=2).train()


def test_the_program_ends_with_one_row_for_the_baseline_and_one_for_each_r(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "test_vit", "--batch-size", "2", "--r", "0", "8", "8", "--steps", "1", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["training", *arguments])
    training.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["impl"], row["r"]) for row in rows] == [("timm", 0), ("ours", 0), ("ours", 8)]
    assert all(row.keys() == {"impl", "r", "images_per_s", "ms", "speedup"} for row in rows)
    for row in rows:
        assert row["images_per_s"] == pytest.approx(2000 / row["ms"])
        assert row["speedup"] == pytest.approx(rows[0]["ms"] / row["ms"])


def test_the_baseline_is_the_plain_model_and_ours_merges(model: Any) -> None:
    plain, unmerged, merged = contenders(model, [0, 20])
    assert plain.forward is model
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(unmerged.forward(x), model(x))
        assert not torch.allclose(merged.forward(x), model(x))


def test_each_is_timed_in_turn_by_its_median_warm_up_apart(model: Any, watch: Watch) -> None:
    turns: list[str] = []

    def taking(name: str, *seconds: float) -> Callable[[Tensor], Tensor]:
        left = [100.0] * WARM_UP + list(seconds)

        def forward(images: Tensor) -> Tensor:
            turns.append(name)
            watch.now += left.pop(0)
            logits: Tensor = model(images)
            return logits

        return forward

    slow, fast = Contender("timm", 0, taking("slow", 4, 90, 4)), Contender("ours", 8, taking("fast", 2, 2, 50))
    before = [parameter.clone() for parameter in model.parameters()]
    rows = measure(model, [slow, fast], batch_size=2, steps=3)
    assert turns == ["slow", "fast"] * (WARM_UP + 3)
    assert rows == [
        {"impl": "timm", "r": 0, "images_per_s": 0.5, "ms": 4000, "speedup": 1},
        {"impl": "ours", "r": 8, "images_per_s": 1, "ms": 2000, "speedup": 2},
    ]
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
