"""benchmarks.soak: slopes, what is seen of processes, the verdict, and a few seconds of the real thing."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.soak import judge, slopes_of
from benchmarks.soak_parts.growth import Growth, growth_of
from benchmarks.soak_parts.traffic import Answers
from benchmarks.soak_parts.watch import OTHERS, Sample, Watched, samples_of, size_mb, watching


@given(st.floats(-50, 50), st.floats(10, 1000), st.integers(4, 60), st.floats(1, 60))
def test_a_line_is_its_slope(percent: float, mean: float, n: int, every_s: float) -> None:
    times_s = [index * every_s for index in range(n)]
    middle = times_s[-1] / 2
    growth = growth_of(times_s, [mean * (1 + percent / 100 * (t - middle) / 3600) for t in times_s])
    assert growth.percent_an_hour == pytest.approx(percent, abs=1e-6)
    assert growth.low <= growth.percent_an_hour <= growth.high


def test_chance_is_no_growth_and_a_leak_is() -> None:
    missed = 0
    for seed in range(100):
        chance, level, values = random.Random(seed), 0.0, []
        for _ in range(300):  # each sample resembles the one before
            level = 0.7 * level + chance.gauss(0, 1)
            values.append(500 + level)
        times_s = [10.0 * index for index in range(len(values))]
        missed += not growth_of(times_s, values).low <= 0 <= growth_of(times_s, values).high
        leaking = growth_of(times_s, [value + 0.01 * t for t, value in zip(times_s, values, strict=True)])
        assert leaking.is_above(1.0) and leaking.is_sure(1.0)
    assert missed <= 15  # of an interval of 95 %, whose correlation is an estimate itself


def test_a_slope_needs_samples_and_nothing_grows_from_nothing() -> None:
    with pytest.raises(ValueError, match="3 samples are too few"):
        growth_of([0, 1, 2], [1, 1, 1])
    assert growth_of([0, 1, 2, 3], [0, 0, 0, 0]) == Growth(0, 0, 0)
    assert not growth_of([0, 1, 2, 3], [5, 5, 5, 5]).is_above(1.0)


def test_processes_are_seen_with_those_that_they_started(tmp_path: Path) -> None:
    """The started process ends when its standard input does."""
    code = "import subprocess, sys; p = subprocess.Popen(['cat']); print('up', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        seen = samples_of({"engine": child.pid})
        assert seen["engine"].memory_mb > 1 and seen["engine"].threads >= 1 and seen["engine"].descriptors >= 3
        assert OTHERS in seen and seen["supervisor"].memory_mb > 1  # this process started it
        log, folder = tmp_path / "log", tmp_path / "state"
        folder.mkdir()
        (folder / "file").write_bytes(os.urandom(1 << 20))
        log.write_text(f"engine is process {child.pid}\n")
        with watching(log, [folder], every_s=60) as watched:
            pass
        assert watched.ids == {"engine": {child.pid}} and not watched.restarted
        assert watched.disk_mb[-1] == pytest.approx(size_mb(folder)) and watched.disk_mb[-1] >= 1
    finally:
        child.kill()
        child.communicate()


def test_a_process_that_comes_later_has_no_slope_and_one_that_comes_again_is_told() -> None:
    watched = Watched()
    for index in range(20):
        now = {"engine": Sample(100.0 + index, 5, 2)} | ({"http-0": Sample(50.0, 5, 2)} if index > 15 else {})
        watched.add(10.0 * index, now, 3.0)
    slopes = slopes_of(watched, settle_s=50)
    assert set(slopes) == {"engine", "disk"} and slopes["engine"].is_above(1.0) and not slopes["disk"].is_above(1.0)
    assert slopes_of(watched, settle_s=1000) == {}
    watched.ids = {"engine": {1, 2}, "http-0": {3}}
    assert watched.restarted == ["engine"]


@pytest.mark.parametrize(
    ("slopes", "wrong", "restarted", "log", "reason"),
    [
        ({"engine": Growth(5, 2, 8)}, {}, [], "", "engine grows by 5.0 % an hour, at least 2.0"),
        ({}, {("classify", "500"): 3}, [], "", "classify: 3 x 500"),
        ({}, {}, ["http-0"], "", "http-0 was restarted"),
        ({}, {}, [], "Traceback (most recent call last)", "1 tracebacks in the log"),
    ],
)
def test_what_does_not_pass(
    slopes: dict[str, Growth], wrong: dict[tuple[str, str], int], restarted: list[str], log: str, reason: str
) -> None:
    verdict = judge(slopes, Answers(wrong=Counter(wrong)), restarted, log)
    assert not verdict["passed"] and verdict["reasons"] == [reason]


def test_a_verdict_says_whether_it_is_sure() -> None:
    assert judge({"engine": Growth(0.2, 0.1, 0.3)}, Answers(), [], "")["is_sure"]
    short = judge({"engine": Growth(0.2, -4, 5)}, Answers(), [], "")
    assert short["passed"] and not short["is_sure"]


@pytest.mark.slow
def test_a_few_seconds_of_it_get_the_answers_that_they_may_get() -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "0.2", "--every", "1", "--rate", "6"]
    done = subprocess.run([*command, "--backend", "torch", "--http-workers", "1"], capture_output=True, text=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["wrong"] == {} and not any("again" in reason or "log" in reason for reason in said["reasons"])
    assert sum(said["answers"].values()) > 20 and {"engine", "http-0", "supervisor"} <= set(said["processes"])
