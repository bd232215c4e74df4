"""The policy of `r=auto`, alone: pure functions of a ladder, a load and where the dial stood."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.batching.policy import BUSY, HOLD_S, Load, Rung, Stance, highest, keeps_up, turn
from server.dial import AutoR

LADDER = [
    Rung((0, 0), 0.004, 0.010, 1.0),
    Rung((8, 8), 0.004, 0.007, 0.95),
    Rung((16, 16), 0.004, 0.005, 0.87),
]
B = 32
IDLE = Load((), 0.0, B)


def arriving(share: float, rung: Rung = LADDER[0]) -> Load:
    """A load that takes this share of a rung's capacity."""
    return Load((), share * B / rung.batch_s(B), B)


times_left = st.lists(st.floats(0.001, 10), max_size=100).map(sorted)
loads = st.builds(Load, times_left, st.floats(0, 1000), st.just(B))
stances = st.builds(Stance, st.integers(0, 2), st.none() | st.floats(0, 100))


def test_an_idle_server_merges_nothing() -> None:
    assert turn(LADDER, IDLE, Stance(), 0.0) == Stance(0)


def test_the_dial_goes_to_the_first_rung_that_keeps_up() -> None:
    assert turn(LADDER, arriving(0.9 * BUSY), Stance(), 0.0).rung == 0
    assert turn(LADDER, arriving(1.1), Stance(), 0.0).rung == 1
    assert turn(LADDER, arriving(1.1, LADDER[1]), Stance(), 0.0).rung == 2
    assert turn(LADDER, arriving(9), Stance(), 0.0).rung == 2


def test_what_waits_counts_by_the_time_it_has_left() -> None:
    hundred = [0.0 + 1.0] * 100
    assert not keeps_up(LADDER[0], Load(hundred, 0.0, B))  # 1.016 s of work
    assert keeps_up(LADDER[0], Load([3.0] * 100, 0.0, B))
    assert turn(LADDER, Load(hundred, 0.0, B), Stance(), 0.0).rung == 2


@given(loads, stances, st.floats(0, 100))
def test_it_goes_up_at_once_and_only_as_far_as_needed(load: Load, stance: Stance, now: float) -> None:
    after = turn(LADDER, load, stance, now)
    enough = [place for place, rung in enumerate(LADDER) if keeps_up(rung, load)]
    needed = enough[0] if enough else len(LADDER) - 1
    assert after.rung >= needed
    if needed >= stance.rung:
        assert after == Stance(needed)
    else:
        assert after.rung <= stance.rung


@given(loads, stances, st.floats(0, 100))
def test_more_load_never_turns_it_lower(load: Load, stance: Stance, now: float) -> None:
    heavier = Load(load.left_s, load.arrivals_per_s * 1.5 + 1, load.max_batch_size)
    assert turn(LADDER, heavier, stance, now).rung >= turn(LADDER, load, stance, now).rung


def test_it_comes_down_when_it_has_been_calm_for_a_while() -> None:
    stance = turn(LADDER, arriving(2), Stance(), 0.0)
    assert stance.rung == 2
    stance = turn(LADDER, IDLE, stance, 10.0)
    assert stance == Stance(2, 10.0)
    stance = turn(LADDER, IDLE, stance, 10.0 + 0.9 * HOLD_S)
    assert stance.rung == 2
    assert turn(LADDER, IDLE, stance, 10.0 + HOLD_S) == Stance(0)


def test_a_moment_of_load_starts_the_wait_again() -> None:
    stance = turn(LADDER, IDLE, Stance(2), 0.0)
    stance = turn(LADDER, arriving(2), stance, 0.5 * HOLD_S)
    assert stance == Stance(2)
    stance = turn(LADDER, IDLE, stance, 0.6 * HOLD_S)
    assert turn(LADDER, IDLE, stance, 1.1 * HOLD_S).rung == 2


def test_between_enough_and_calm_it_stays() -> None:
    just = arriving(0.93)  # r=0 keeps up, with nothing to spare
    assert keeps_up(LADDER[0], just)
    stance = Stance(1)
    for now in range(10):
        stance = turn(LADDER, just, stance, float(now))
    assert stance.rung == 1


def test_bounds_stop_it() -> None:
    assert highest(LADDER, AutoR()) == 2
    assert highest(LADDER, AutoR(max_r=8)) == 1
    assert highest(LADDER, AutoR(max_r=0)) == 0
    assert highest(LADDER, AutoR(min_agreement=0.9)) == 1
    assert highest(LADDER, AutoR(min_agreement=1.0)) == 0
    assert highest([LADDER[0], Rung((4, 4), 0.0, 0.01)], AutoR(min_agreement=0.9)) == 0  # nobody measured it
