"""The ladder of `r=auto` for a model without a curve on this device."""

from __future__ import annotations

import pytest
import timm

from server.calibration.timing import RUNGS, schedules, timed, timed_steps
from server.curve import Curve, CurveRow
from server.device.models import LoadedModel
from server.dial import Schedule
from server.images.preprocessing import Preprocessing
from server.types import ModelInfo
from tests.server.conftest import facts
from tome_core import wrap
from tome_core.cost import flops
from tome_core.families.dimensions import dimensions
from tome_core.families.family import UnsupportedModelError


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    merged = wrap(timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=5).eval())
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing((224, 224), (224, 224), "center", "bicubic", half, half)
    return LoadedModel(merged, ModelInfo("m", "vit", "test", tuple("abcde"), preprocessing, 4, 197, 1, merged.max_r))


def test_it_runs_from_r_0_to_half_of_the_arithmetic(loaded: LoadedModel) -> None:
    ladder, sizes = schedules(loaded), dimensions(loaded.merged)
    costs = [flops(sizes, schedule) for schedule in ladder]
    assert len(ladder) == RUNGS and ladder[0] == (0,) * 4
    assert costs == sorted(costs, reverse=True)
    less = tuple(r - 1 for r in ladder[-1])
    assert costs[-1] <= costs[0] / 2 < flops(sizes, less)


def test_r_0_is_timed_and_the_others_follow_their_arithmetic(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, ran = [0.0], set()

    def run(schedule: Schedule, images: int) -> None:
        ran.add(schedule)
        now[0] += 0.01 + 0.002 * images

    monkeypatch.setattr("server.calibration.timing.time.perf_counter", lambda: now[0])
    ladder = schedules(loaded)
    steps = timed_steps(loaded, ladder, run, 32)
    assert ran == {ladder[0]}
    assert (steps[0].overhead_s, steps[0].image_s) == pytest.approx((0.01, 0.002))
    assert steps[-1].image_s == pytest.approx(0.001, rel=0.05)
    assert [step.schedule for step in steps] == ladder and {step.agreement for step in steps} == {None}


def test_where_the_background_times_all_steps_one_image_is_run_once(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, ran = [0.0], list[tuple[Schedule, int]]()

    def run(schedule: Schedule, images: int) -> None:
        ran.append((schedule, images))
        now[0] += 0.03

    monkeypatch.setattr("server.calibration.timing.time.perf_counter", lambda: now[0])
    steps = timed_steps(loaded, schedules(loaded), run, 32, roughly=True)
    assert ran == [((0,) * 4, 1)] and steps[0].image_s == pytest.approx(0.03)


def test_batches_of_one_are_timed_too(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def run(schedule: Schedule, images: int) -> None:
        assert images == 1
        now[0] += 0.05

    monkeypatch.setattr("server.calibration.timing.time.perf_counter", lambda: now[0])
    assert timed_steps(loaded, schedules(loaded), run, 1)[0].image_s == pytest.approx(0.05)


def test_a_curve_of_another_device_keeps_its_agreement_and_gets_the_speeds_of_this_one(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def run(schedule: Schedule, images: int) -> None:
        now[0] += 0.01 + 0.002 * images

    monkeypatch.setattr("server.calibration.timing.time.perf_counter", lambda: now[0])
    rows = tuple(
        CurveRow(r=(r,) * 4, tokens=197 - 4 * r, agreement=agreement, agreement_interval=(0.5, 1.0))
        for r, agreement in ((0, 1.0), (16, 0.9), (8, 0.95))
    )
    made = Curve(model="m", facts=facts(), measured="2026-11-22", photos=10, max_batch_size=1, rows=rows)
    unmerged, fast, between = timed(made, loaded, run, 32, facts()).rows
    assert [row.agreement for row in (unmerged, fast, between)] == [1.0, 0.9, 0.95]
    assert unmerged.line == pytest.approx((0.01, 0.002)) and unmerged.images_per_s == pytest.approx(32 / 0.074)
    assert fast.line is not None and between.line is not None
    assert fast.line[1] < between.line[1] < 0.002


def test_where_operations_cannot_be_counted_tokens_are(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(merged: object) -> None:
        raise UnsupportedModelError("parallel blocks")

    monkeypatch.setattr("server.calibration.timing.dimensions", refuse)
    ladder = schedules(loaded)
    tokens = [sum(loaded.info.token_counts(schedule)[1:]) for schedule in ladder]
    assert len(ladder) == RUNGS and tokens[-1] <= tokens[0] / 2
    steps = timed_steps(loaded, ladder, lambda schedule, images: None, 8)
    assert [step.schedule for step in steps] == ladder
