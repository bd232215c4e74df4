"""The benchmark of schedules on a tiny model: it reports on photos that it did not choose on, and keeps the budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import schedule
from benchmarks.schedule_parts.rows import Kind, ScheduleRow, judge
from server.cli import main
from server.device.models import load_model
from server.dial import PlainR, Schedule, parse_r, text_of
from server.model_spec import ModelSpec
from tests.schedule.conftest import COUNT
from tome_core.cost import flops
from tome_core.families.dimensions import dimensions

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def benchmark(model: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs it with few trials and further arguments."""
    fixed = ["--model", model, "--tuned", "none", "--images", str(photos), "--threads", "1"]

    def run(*more: str) -> None:
        monkeypatch.setattr("sys.argv", ["schedule", *fixed, "--rounds", "1", "--trials", "8", *more])
        schedule.main()

    return run


def found(said: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(said.splitlines()[-1])
    return result


def test_it_reports_beside_constant_r_at_each_speed_up(
    benchmark: Callable[..., None], model: str, capsys: Capture
) -> None:
    benchmark("--speedup", "1.3", "1.6")
    shown = capsys.readouterr()
    result = found(shown.out)
    assert (result["model"], result["cost"]) == ("four-blocks", "GFLOPs")
    assert result["photos_to_choose_on"] == result["photos_to_report_on"] == COUNT // 2
    assert [(row["speedup"], row["kind"]) for row in result["rows"]] == [
        (speedup, kind) for speedup in (1.3, 1.6) for kind in ("found", "even", "constant")
    ]
    counted = dimensions(load_model(ModelSpec.model_validate({"source": model})).merged)
    for row in result["rows"]:
        assert row["cost"] == flops(counted, row["r"]) / 1e9 <= result["timm_cost"] / row["speedup"]
        assert row["interval"][0] <= row["agreement"] <= row["interval"][1]
        assert 0 < row["distance"] < 1
        assert row["agreement"] * 12 == pytest.approx(round(row["agreement"] * 12))
    for best, even, constant in (result["rows"][:3], result["rows"][3:]):
        assert best["gain"] is None and len(set(constant["r"])) == 1
        assert best["r"][-1] == even["r"][-1] == 0  # nothing reads what the last block merges
        for row in (even, constant):
            assert row["gain"][0] == pytest.approx(best["agreement"] - row["agreement"])
    table = shown.out.splitlines()
    assert len(table) == 1 + 6 + 2 + 1 and "GFLOPs" in table[0] and "1.60x" in table[4]
    for line, verdict in zip(table[7:9], result["verdicts"], strict=True):
        assert line == f"{verdict['speedup']:.2f}x: take r={text_of(parse_r(verdict['take']))}. {verdict['why']}"
    assert "round 1 of 1" in shown.err


def row(kind: Kind, r: int | Schedule, gain: tuple[float, float, float] | None = None) -> ScheduleRow:
    return ScheduleRow(1.5, kind, r if isinstance(r, tuple) else (r,) * 4, 1.0, 0.9, (0.8, 0.95), 0.1, gain)


FOUND = (8, 6, 4, 0)
SURE, CHANCE, LOSS = (0.02, 0.005, 0.035), (0.01, -0.005, 0.025), (-0.02, -0.03, -0.01)


@pytest.mark.parametrize(
    ("found_r", "over_even", "over_constant", "take", "why"),
    [
        (FOUND, SURE, SURE, FOUND, "It gains +2.0 points (+0.5 to +3.5) over r=5."),
        (FOUND, SURE, CHANCE, 5, "The found list gains +1.0 points (-0.5 to +2.5) over r=5: that may be chance."),
        (FOUND, SURE, (0.0, 0.0, 0.0), 5, "The found list gains +0.0 points (+0.0 to +0.0) over r=5: that may be"),
        (FOUND, SURE, LOSS, 5, "The found list gains -2.0 points (-3.0 to -1.0) over r=5: it loses answers."),
        (FOUND, CHANCE, SURE, 5, "The found list gains +1.0 points (-0.5 to +2.5) over merging that is spread evenly"),
        ((5, 5, 5, 5), SURE, CHANCE, 5, "The search found nothing else than r=5."),
        ((6, 6, 6, 0), CHANCE, SURE, 5, "The search found nothing else than merging that is spread evenly"),
    ],
)
def test_a_list_is_recommended_only_where_its_interval_says_so(
    found_r: Schedule,
    over_even: tuple[float, float, float],
    over_constant: tuple[float, float, float],
    take: PlainR,
    why: str,
) -> None:
    verdict = judge(row("found", found_r), row("even", (6, 6, 6, 0), over_even), row("constant", 5, over_constant))
    assert verdict.take == take and verdict.why.startswith(why)


def test_what_it_finds_can_be_served(
    benchmark: Callable[..., None], model: str, photos: Path, capsys: Capture, tmp_path: Path
) -> None:
    saved = tmp_path / "schedule.json"
    benchmark("--speedup", "1.5", "-o", str(saved))
    shown = capsys.readouterr().out
    result = found(shown)
    assert json.loads(saved.read_text()) == result
    text = shown.splitlines()[1].split()[-1]
    assert parse_r(text) == tuple(result["rows"][0]["r"])
    assert main(["classify", "--model", model, "--json", "--r", text, str(photos / "0.png")]) == 0
    assert json.loads(capsys.readouterr().out)["r"] == result["rows"][0]["r"]


def test_the_fewest_photos_do(benchmark: Callable[..., None], capsys: Capture) -> None:
    benchmark("--speedup", "1.5", "--limit", "8")
    assert found(capsys.readouterr().out)["photos_to_choose_on"] == 4


def test_the_seed_decides_everything(benchmark: Callable[..., None], capsys: Capture) -> None:
    said = []
    for seed in ("3", "3", "4"):
        benchmark("--speedup", "1.5", "--seed", seed)
        said.append(found(capsys.readouterr().out))
    assert said[0] == said[1] != said[2]


def test_latency_is_measured(benchmark: Callable[..., None], capsys: Capture) -> None:
    # 0.2 times as fast as timm is within reach however slow merging is in so small a model.
    benchmark("--speedup", "0.2", "--cost", "latency", "--max-batch-size", "4")
    shown = capsys.readouterr()
    result = found(shown.out)
    assert result["cost"] == "ms/4" and all(row["cost"] > 0 for row in result["rows"])
    assert "latency is predicted to" in shown.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--speedup", "50"], "speedup is 50"),
        (["--speedup", "-1"], "speedup is -1"),
        (["--speedup", "1.5", "--limit", "7"], "limit is 7; it must be 8"),
        (["--speedup", "1.5", "--trials", "3"], "trials is 3"),
        (["--speedup", "1.5", "--rounds", "0"], "rounds is 0"),
        (["--speedup", "1.5", "--images", "nowhere"], "nowhere holds 0 images; at least 8"),
        (["--speedup", "1.5", "--tuned", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--speedup", "1.5", "--precision", "int3"], "precision"),
        (["--speedup", "1.5", "-o", "nowhere/schedule.json"], "nowhere"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], named: str, benchmark: Callable[..., None]) -> None:
    with pytest.raises(SystemExit, match=named):
        benchmark(*arguments)
