"""Permits: how many images are in flight, and whether those before leave time enough."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from server.api.admission import LONGEST_TURN_S, Admission
from server.errors import QueueFullError, TooLargeError

FOREVER = 1e6


@pytest.fixture
def admission(monkeypatch: pytest.MonkeyPatch) -> Admission:
    """100 places; images have been leaving it every tenth of a second."""
    now = 0.0
    monkeypatch.setattr("server.api.admission.time.monotonic", lambda: now)
    admission = Admission(100)
    with ExitStack() as last:
        last.enter_context(admission.permit(1, FOREVER))  # it never stands empty
        for _ in range(300):
            with admission.permit(1, FOREVER):
                now += 0.1
    return admission


def test_what_could_not_be_answered_in_time_is_refused_before_it_is_decoded(admission: Admission) -> None:
    with admission.permit(20, 1.0):
        with pytest.raises(QueueFullError, match=r"1\.9\d s of work; the deadline is 1 s") as refusal:
            with admission.permit(1, 1.0):
                pass
        assert refusal.value.retry_after_s == pytest.approx(0.93, abs=0.05)
        with admission.permit(1, 3.0):
            assert admission.in_flight == 21
    with admission.permit(1, 0.01):  # nothing is before it
        assert admission.in_flight == 1


def test_places_are_counted_and_given_back(admission: Admission) -> None:
    with admission.permit(100, FOREVER), pytest.raises(QueueFullError):
        with admission.permit(1, FOREVER):
            pass
    with pytest.raises(TooLargeError, match="101 images; at most 100"):
        with admission.permit(101, FOREVER):
            pass
    assert admission.in_flight == 0


def test_the_refused_are_told_to_come_one_after_the_other(admission: Admission) -> None:
    told = []
    with admission.permit(100, FOREVER):
        for _ in range(250):
            with pytest.raises(QueueFullError) as refusal:
                with admission.permit(1, FOREVER):
                    pass
            told.append(refusal.value.retry_after_s or 0.0)
    # After the hundred in flight, a tenth of a second each; and none later than it makes sense to say.
    assert told[:3] == [pytest.approx(10.0 + 0.1 * index, rel=0.05) for index in range(3)]
    assert told == sorted(told) and told[100] == pytest.approx(20.0, rel=0.05) and told[-1] == LONGEST_TURN_S


def test_before_the_pace_is_known_nobody_is_refused_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("server.api.admission.time.monotonic", lambda: now)
    admission = Admission(100)
    with admission.permit(31, 1.0):
        with admission.permit(1, 1.0):
            now += 1.0  # the first batch warms the device up
        with admission.permit(1, 1.0):
            assert admission.in_flight == 32
