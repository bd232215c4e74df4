"""The ladder while it warms up: compiled, timed, its gaps filled, and untouched by the fallback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batching.auto import AutoDial
from server.batching.policy import Load, Rung
from server.batching.speed import Speed
from server.calibration import speeds
from server.calibration.background import MOST_TURNS, TURNS, Ladder, bisected
from server.calibration.timing import Line, in_order, interpolated
from server.curve import Curve
from server.dial import AutoR, Schedule
from server.types import BatchKey
from tests.server.conftest import facts, fake_curve, model_info

INFO = model_info()
SCHEDULES: list[Schedule] = [(r, r, r) for r in (0, 1, 2, 4, 6, 8)]
COSTS = dict(zip(SCHEDULES, (100.0, 93.0, 85.0, 70.0, 58.0, 50.0), strict=True))
UNMERGED = SCHEDULES[0]
FALLBACK_S = 9.0

lines = st.tuples(st.floats(0, 0.01), st.floats(1e-3, 0.05))
shares = st.lists(st.floats(0.1, 1.0), min_size=len(SCHEDULES) - 1, max_size=len(SCHEDULES) - 1)


def falling(unmerged: Line, factors: Sequence[float]) -> dict[Schedule, Line]:
    """Lines of which each takes no longer than the one before."""
    found = {UNMERGED: unmerged}
    for schedule, factor in zip(SCHEDULES[1:], factors, strict=True):
        a, b = list(found.values())[-1]
        found[schedule] = a * factor, b * factor
    return found


def seconds(line: Line, n: int) -> float:
    return line[0] + line[1] * n


class Server:
    """A device that computes what is compiled as `true` says, and all else for as long as the fallback takes."""

    def __init__(self, true: Mapping[Schedule, Line], pace: Sequence[float] = (1.0,)) -> None:
        self.true, self.now, self.paces = true, 0.0, list(pace)
        self.compiled, self.kept = {UNMERGED}, list[Mapping[Schedule, Line]]()
        self.speed = Speed[BatchKey](lambda: self.now, lambda key: key.schedule not in self.compiled)
        self.callback: Callable[[Schedule], None] = lambda schedule: None
        self.planned: list[Schedule] = []
        self.told: list[Mapping[BatchKey, Line]] = []
        guesses = interpolated({UNMERGED: true[UNMERGED]}, SCHEDULES, COSTS.__getitem__)
        self.dial = AutoDial(INFO.batch_key, [Rung(s, *line, 0.9) for s, line in guesses.items()], self.speed)
        self.ladder = self.made({})
        self.ladder.begin(lambda work: work(), self.tell)

    def made(self, known: Mapping[Schedule, Line]) -> Ladder:
        return Ladder(
            INFO, SCHEDULES, self.plan, self.run, COSTS.__getitem__, 32, known, self.kept.append, lambda: self.now
        )

    def plan(self, schedules: Sequence[Schedule], compiled: Callable[[Schedule], None]) -> None:
        self.planned, self.callback = list(schedules), compiled

    def run(self, schedule: Schedule, images: int) -> None:
        pace = self.paces.pop(0) if len(self.paces) > 1 else self.paces[0]
        self.now += pace * seconds(self.true[schedule], images)

    def tell(self, lines: Mapping[BatchKey, Line]) -> None:
        self.told.append(lines)
        for key, line in lines.items():
            self.speed.expect(key, *line)

    def compile(self, schedule: Schedule) -> None:
        self.compiled.add(schedule)
        self.callback(schedule)

    def answer(self, schedule: Schedule, n: int) -> None:
        is_fallback = schedule not in self.compiled
        took_s = FALLBACK_S * n if is_fallback else seconds(self.true[schedule], n)
        self.now += took_s
        self.speed.observe(INFO.batch_key(schedule), n, took_s, is_fallback)

    def drawn(self) -> list[Line]:
        """The lines of the curve as it is drawn."""
        return [self.speed.own_line(INFO.batch_key(schedule)) or (-1.0, -1.0) for schedule in SCHEDULES]


events = st.lists(
    st.one_of(
        st.tuples(st.just("compile"), st.sampled_from(SCHEDULES), st.just(0)),
        st.tuples(st.just("answer"), st.sampled_from(SCHEDULES), st.integers(1, 32)),
    ),
    max_size=25,
)


@given(lines, shares, events)
def test_the_curve_and_the_dial_stay_monotone_while_schedules_warm_up(
    unmerged: Line, factors: list[float], happened: list[tuple[str, Schedule, int]]
) -> None:
    server = Server(falling(unmerged, factors))
    for what, schedule, n in happened:
        if what == "compile":
            server.compile(schedule)
        else:
            server.answer(schedule, n)
        drawn = server.drawn()
        for size in (1, 8, 32):
            times = [seconds(line, size) for line in drawn]
            assert all(after <= before * (1 + 1e-6) for before, after in zip(times, times[1:], strict=False)), times
            assert times[0] <= 1.001 * seconds(unmerged, size)
        server.dial.choose(Load([], 0.0, 32), AutoR())
        ladder = server.dial._ladder
        assert [rung.schedule for rung in ladder] == [each for each in SCHEDULES if each in server.compiled]
        assert all(a.batch_s(32) >= b.batch_s(32) * (1 - 1e-6) for a, b in zip(ladder, ladder[1:], strict=False))


def test_the_fallback_is_expected_to_take_what_it_took_and_the_backend_what_it_takes() -> None:
    server, key = Server(falling((0.0, 0.04), [0.9] * 5)), INFO.batch_key((4, 4, 4))
    before = server.drawn()
    server.answer((4, 4, 4), 2)
    assert server.speed(key, 1) == pytest.approx(FALLBACK_S) and server.drawn() == before
    server.compile((4, 4, 4))
    server.answer((4, 4, 4), 2)
    assert server.speed(key, 1) == pytest.approx(0.04 * 0.9**3)
    server.compiled.discard((4, 4, 4))  # another schedule has taken its place
    assert server.speed(key, 1) == pytest.approx(FALLBACK_S)


def test_under_load_auto_takes_no_schedule_that_is_not_compiled() -> None:
    server = Server(falling((0.0, 0.04), [0.9] * 5))
    load = Load([0.5] * 64, 1000.0, 32)
    assert server.dial.choose(load, AutoR()).schedule == UNMERGED
    for schedule in ((4, 4, 4), (2, 2, 2)):
        server.compile(schedule)
        assert server.dial.choose(load, AutoR()).schedule == (4, 4, 4)


@given(st.lists(lines, min_size=len(SCHEDULES), max_size=len(SCHEDULES)), st.sampled_from([1, 8, 32]))
def test_noise_never_makes_a_schedule_slower_than_one_that_merges_less(timed: list[Line], most: int) -> None:
    found = in_order(dict(zip(SCHEDULES, timed, strict=True)), COSTS.__getitem__, most)
    assert found[UNMERGED] == timed[0]
    for n in {1, most}:
        times = [seconds(found[schedule], n) for schedule in SCHEDULES[1:]]
        assert all(after <= before * (1 + 1e-6) for before, after in zip(times, times[1:], strict=False)), times
        assert sum(times) == pytest.approx(sum(seconds(line, n) for line in timed[1:]))


@given(lines, shares)
def test_lines_in_order_stay_as_they_were_timed(unmerged: Line, factors: list[float]) -> None:
    true = falling(unmerged, factors)
    found = in_order(true, COSTS.__getitem__, 32)
    assert all(found[each] == pytest.approx(true[each], abs=1e-12) for each in SCHEDULES)


@given(lines, shares, st.sets(st.sampled_from(SCHEDULES[1:])))
def test_lines_between_those_that_were_timed_lie_between_them(
    unmerged: Line, factors: list[float], timed: set[Schedule]
) -> None:
    true = falling(unmerged, factors)
    found = interpolated({each: true[each] for each in (UNMERGED, *timed)}, SCHEDULES, COSTS.__getitem__)
    assert all(found[each] == true[each] for each in timed)
    for size in (1, 32):
        times = [seconds(found[schedule], size) for schedule in SCHEDULES]
        assert all(after <= before * (1 + 1e-9) for before, after in zip(times, times[1:], strict=False))


def test_the_middle_of_a_ladder_is_compiled_first_then_its_end_then_what_lies_between() -> None:
    ladder = [(r,) for r in (0, 4, 8, 12, 16, 18, 20, 21)]
    assert [r for (r,) in bisected(ladder)] == [16, 21, 8, 18, 4, 12, 20]
    assert bisected([(0,)]) == [] and bisected([(0,), (4,)]) == [(4,)]
    assert Server(falling((0.0, 0.1), [0.9] * 5)).planned == [SCHEDULES[place] for place in (3, 5, 1, 4, 2)]


def test_a_schedule_is_timed_in_turns_with_r_0_so_that_a_slow_minute_falls_on_both() -> None:
    true = falling((0.002, 0.04), [0.9] * 5)
    runs = 3 * TURNS  # of r=0 alone
    server = Server(true, pace=[1.0] * runs + [3.0])
    server.compile((4, 4, 4))
    found = {key.schedule: line for key, line in server.told[-1].items()}
    for schedule in (UNMERGED, (4, 4, 4)):
        assert found[schedule] == pytest.approx(true[schedule])


def test_a_machine_that_does_something_else_most_of_the_time_is_timed_until_it_is_quiet() -> None:
    true = falling((0.002, 0.04), [0.9] * 5)
    disturbed = [2.0, 5.0, 3.0, 9.0, 1.5, 30.0, 4.0]
    server = Server(true, pace=[1.0 if turn % 3 == 2 else disturbed[turn % 7] for turn in range(36) for _ in range(3)])
    server.compile((4, 4, 4))
    found = {key.schedule: line for key, line in server.told[-1].items()}
    assert found[4, 4, 4] == pytest.approx(true[4, 4, 4], rel=0.01)


def test_a_machine_that_is_never_quiet_is_timed_for_so_many_turns() -> None:
    server = Server(falling((0.0, 0.04), [0.9] * 5), pace=[2.0**place for place in range(1000)])
    ran, run = list[Schedule](), server.run

    def noting(schedule: Schedule, images: int) -> None:
        ran.append(schedule)
        run(schedule, images)

    server.ladder._run = noting
    server.compile((4, 4, 4))
    assert ran.count((4, 4, 4)) == 2 * MOST_TURNS


def test_r_0_is_timed_again_once_it_is_compiled_for_batches() -> None:
    server = Server(falling((0.0, 0.08), [0.9] * 5))
    server.compile((4, 4, 4))
    server.true = dict(server.true) | {UNMERGED: (0.0, 0.07)}
    server.compile(UNMERGED)
    assert server.drawn()[0] == pytest.approx((0.0, 0.07))


def test_once_each_schedule_was_timed_the_lines_are_kept_and_nothing_is_timed_again() -> None:
    true = falling((0.002, 0.04), [0.9] * 5)
    server = Server(true)
    for schedule in (*SCHEDULES[1:], UNMERGED):
        assert server.kept == []
        server.compile(schedule)
    assert server.kept[0] == {schedule: pytest.approx(line) for schedule, line in true.items()}
    before = len(server.told)
    server.compile((2, 2, 2))
    server.compile((8, 1, 0))  # of no curve
    server.made(server.kept[0]).begin(lambda work: work(), server.tell)
    server.compile((4, 4, 4))
    assert len(server.told) == before


def kept_lines(curve: Curve) -> dict[Schedule, Line]:
    return {row.r: (0.001, 0.01 * (1 + place)) for place, row in enumerate(curve.rows)}


def test_the_speeds_of_a_curve_are_kept_for_the_next_start_with_the_same_facts(tmp_path: Path) -> None:
    curve, here = fake_curve(), facts(device="loom")
    assert speeds.kept("tiny", curve, here, tmp_path) is None
    speeds.keep("tiny", curve, kept_lines(curve), here, tmp_path)
    again = speeds.kept("tiny", curve, here, tmp_path)
    assert again is not None and {row.r: row.line for row in again.rows} == kept_lines(curve)
    assert again.speed_from.facts == here and again.facts == curve.facts
    assert [row.agreement for row in again.rows] == [row.agreement for row in curve.rows]
    assert speeds.kept("tiny", curve, facts(device="abacus"), tmp_path) is None
    assert speeds.kept("tiny", curve, facts(device="loom", threads=9), tmp_path) is None
    more = curve.model_copy(update={"rows": (*curve.rows, curve.rows[-1].model_copy(update={"r": (9, 9, 9)}))})
    assert speeds.kept("tiny", more, here, tmp_path) is None


def test_speeds_that_cannot_be_kept_are_timed_again(tmp_path: Path) -> None:
    (tmp_path / "speeds").write_text("a file")
    speeds.keep("tiny", fake_curve(), kept_lines(fake_curve()), facts(), tmp_path)
    assert speeds.kept("tiny", fake_curve(), facts(), tmp_path) is None
    assert speeds.kept("tiny", fake_curve(), facts(), None) is None
