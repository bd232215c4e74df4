"""The metrics of several processes as one: in memory that outlives each, and that a scrape of any shows whole."""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.parser import text_string_to_metric_families

from server import shared_values
from server.shared_values import Collector, Sheet, join

ROOT = Path(__file__).resolve().parents[2]
spawn = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def _alone_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test may write on sheets; the metrics of this process stay where they are."""
    before = values.ValueClass
    yield
    values.ValueClass = before


def metrics_on(sheet: Sheet) -> dict[str, Any]:
    """Metrics that keep their values on a sheet, as a process that has joined makes them."""
    values.ValueClass = shared_values._value_class(
        shared_values._Writer(sheet.totals), shared_values._Writer(sheet.gauges)
    )
    registry = CollectorRegistry()
    modes = {mode: Gauge(mode, "of some", ["a"], registry=registry, multiprocess_mode=mode) for mode in MODES}  # type: ignore[arg-type]
    return {
        "class": values.ValueClass,
        "counter": Counter("counted", "so many", ["a"], registry=registry),
        "histogram": Histogram("seconds", "so long", ["a"], buckets=(0.1, 1), registry=registry),
        **modes,
    }


MODES = ("livemin", "livemax", "livesum")


def scraped(*sheets: Sheet) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(Collector(sheets))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        f"{sample.name}{json.dumps(sample.labels, sort_keys=True)}": sample.value
        for family in families
        for sample in family.samples
    }


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("xyz"), st.floats(0, 5)), max_size=30))
def test_a_scrape_shows_what_all_have_counted(said: list[tuple[int, str, float]]) -> None:
    sheets = [Sheet() for _ in range(3)]
    metrics = [metrics_on(sheet) for sheet in sheets]
    for index, label, value in said:
        values.ValueClass = metrics[index]["class"]
        metrics[index]["counter"].labels(label).inc(value)
        metrics[index]["histogram"].labels(label).observe(value)
        for mode in MODES:
            metrics[index][mode].labels(label).set(value)
    shown = scraped(*sheets)
    for label in {label for _, label, _ in said}:
        of_it = [value for _, each, value in said if each == label]
        last = {index: value for index, each, value in said if each == label}.values()
        labels = json.dumps({"a": label})
        assert math.isclose(shown[f"counted_total{labels}"], sum(of_it), abs_tol=1e-9)
        assert math.isclose(shown[f"seconds_sum{labels}"], sum(of_it), abs_tol=1e-9)
        assert shown[f"seconds_count{labels}"] == len(of_it)
        bounds = {"0.1": 0.1, "1.0": 1.0, "+Inf": math.inf}
        for text, bound in bounds.items():
            bucket = json.dumps({"a": label, "le": text})
            assert shown[f"seconds_bucket{bucket}"] == sum(value <= bound for value in of_it)
        assert shown[f"livemin{labels}"] == min(last)
        assert shown[f"livemax{labels}"] == max(last)
        assert math.isclose(shown[f"livesum{labels}"], sum(last), abs_tol=1e-9)


def test_totals_outlive_a_process_and_its_gauges_do_not() -> None:
    sheet = Sheet()
    first = metrics_on(sheet)
    first["counter"].labels("x").inc(3)
    first["histogram"].labels("x").observe(0.5)
    first["livemax"].labels("x").set(7)
    sheet.forget_gauges()
    assert 'livemax{"a": "x"}' not in scraped(sheet)
    second = metrics_on(sheet)
    second["counter"].labels("x").inc(2)
    second["livemax"].labels("x").set(1)
    shown = scraped(sheet)
    assert shown['counted_total{"a": "x"}'] == 5
    assert shown['seconds_count{"a": "x"}'] == 1
    assert shown['livemax{"a": "x"}'] == 1


def test_more_values_than_there_was_room_for_are_all_shown() -> None:
    sheet = Sheet()
    counter = metrics_on(sheet)["counter"]
    before = os.fstat(sheet.totals.fileno()).st_size
    for index in range(2000):
        counter.labels(f"{index}" * 10).inc(index)
    assert os.fstat(sheet.totals.fileno()).st_size > before
    shown = scraped(sheet)
    assert all(shown[f"counted_total{json.dumps({'a': f'{index}' * 10})}"] == index for index in range(2000))
    counter.labels("0" * 10).inc(1)  # from before it grew
    assert scraped(sheet)[f"counted_total{json.dumps({'a': '0' * 10})}"] == 1


@pytest.mark.parametrize("left", [b"\xff" * 8, b"\x10" + bytes(7), b"\x40" + bytes(7) + b"\xff" * 56])
def test_what_is_no_list_of_values_is_begun_anew(left: bytes) -> None:
    sheet = Sheet()
    sheet.totals.write(left)
    metrics_on(sheet)["counter"].labels("x").inc()
    assert scraped(sheet)['counted_total{"a": "x"}'] == 1


def test_who_has_not_begun_shows_nothing() -> None:
    assert scraped(Sheet()) == {}


def count_and_die(sheets: list[Sheet], index: int) -> None:
    join(sheets, index)
    from server.metrics import CONFIG_VERSION, REQUESTS

    REQUESTS.labels("tiny", "8", "200").inc(index + 2)
    CONFIG_VERSION.set(index)
    os.kill(os.getpid(), signal.SIGKILL)


def scrape(sheets: list[Sheet], index: int, shown: str) -> None:
    join(sheets, index)
    from server.metrics import exposition

    Path(shown).write_bytes(exposition())


def test_real_processes_share_them_and_one_that_is_killed_leaves_its_totals(tmp_path: Path) -> None:
    sheets = [Sheet() for _ in range(3)]
    for index in (0, 1):
        process = spawn.Process(target=count_and_die, args=(sheets, index))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    sheets[1].forget_gauges()
    process = spawn.Process(target=scrape, args=(sheets, 2, str(tmp_path / "shown")))
    process.start()
    process.join()
    shown = (tmp_path / "shown").read_text().splitlines()
    assert 'tome_requests_total{code="200",model="tiny",r="8"} 5.0' in shown
    assert "tome_config_version 0.0" in shown  # of the one process whose death nobody has noticed


def test_metrics_that_exist_already_are_not_joined_without_a_word() -> None:
    import server.metrics  # noqa: F401

    with pytest.raises(RuntimeError, match="exist already"):
        join([Sheet()], 0)


def test_a_process_that_starts_has_no_metrics_before_it_joins() -> None:
    """It unpickles its arguments first, and their modules must not make any."""
    code = "import server.supervisor, sys; sys.exit('server.metrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


async def test_gauges_of_several_are_the_worst_of_what_they_measure(tmp_path: Path) -> None:
    """Two HTTP processes of which one has lost engine 1, and two engines."""
    sheets = [Sheet() for _ in range(5)]
    for index in range(4):
        process = spawn.Process(target=measure, args=(sheets, index))
        process.start()
        await asyncio.to_thread(process.join)
    process = spawn.Process(target=scrape, args=(sheets, 4, str(tmp_path / "shown")))
    process.start()
    await asyncio.to_thread(process.join)
    shown = (tmp_path / "shown").read_text().splitlines()
    assert 'tome_engine_up{engine="0"} 1.0' in shown
    assert 'tome_engine_up{engine="1"} 0.0' in shown
    assert 'tome_live_agreement{model="tiny",r="8"} 0.8' in shown
    assert 'tome_drift{model="tiny",r="8"} 1.0' in shown
    assert "tome_config_version 5.0" in shown
    assert "tome_config_source_up 0.0" in shown
    assert "tome_config_stale 1.0" in shown


def measure(sheets: list[Sheet], index: int) -> None:
    join(sheets, index)
    from server import metrics

    if index < 2:
        metrics.ENGINE_UP.labels("0").set(1)
        metrics.ENGINE_UP.labels("1").set(index)
        return
    engine = index - 2
    metrics.CONFIG_VERSION.set((4, 5)[engine])
    metrics.CONFIG_SOURCE_UP.set(engine)
    metrics.CONFIG_STALE.set(engine)
    metrics.LIVE_AGREEMENT.labels("tiny", "8").set((0.97, 0.8)[engine])
    metrics.DRIFT.labels("tiny", "8").set(engine)
