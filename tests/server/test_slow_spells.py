"""A device is slow for a while: what can be answered afterwards is answered, and what cannot be in time is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.api.admission import Admission
from server.batching.auto import AutoDial
from server.batching.batcher import Batcher
from server.batching.policy import Rung
from server.batching.queues import LONGEST_TRY_PAUSE_S, TRY_AFTER_S
from server.bench.load import poisson
from server.calibration.simulator import _in_virtual_time
from server.dial import AutoR, Schedule
from server.errors import ServerError
from server.types import BatchKey

BATCH_S = {"measured": 0.05, "faster than measured": 0.04, "learned": 0.06, "never seen": 0.03}
"""Seconds of a batch of one; each further job takes a fifth of that."""

EXPECTED = {"measured": 1.0, "faster than measured": 8.0}
"""What is told of keys beforehand, in times of the truth: the second was measured while the machine was busy."""

PATIENT_S = 30.0


@dataclass(frozen=True)
class Ask:
    """A request: when it comes, of which key, and how long it may take."""

    at: float
    key: str
    within_s: float


@dataclass
class World:
    """A batcher and its device in virtual time.

    Args:
        slow: By what factor work takes longer at a moment; it changes no more often than every `STEP_S`.
        num_stages: Of a batch; where there are two, the first takes half as long.
    """

    slow: Callable[[float], float]
    num_stages: int
    device_s: dict[str, float] = field(default_factory=dict)

    def serve(self, asks: Sequence[Ask], until: float = 0.0, then: Sequence[Ask] = ()) -> list[tuple[Ask, int]]:
        """The status of each request, in the order in which they ended.

        Args:
            asks: Requests.
            until: When the others begin at the earliest; they do so when these are done.
            then: The others, one after the other: each comes so long after the answer to the one before it.
        """
        return _in_virtual_time(self._serve(asks, until, then))

    async def _serve(self, asks: Sequence[Ask], until: float, then: Sequence[Ask]) -> list[tuple[Ask, int]]:
        clock = asyncio.get_running_loop().time
        first, second = asyncio.Lock(), asyncio.Lock()

        async def work(key: str, payloads: Sequence[int], share: float, stage: asyncio.Lock) -> Sequence[int]:
            async with stage:  # one batch after the other
                began, left_s = clock(), share * (4 + len(payloads)) / 5 * BATCH_S[key]
                while left_s > 1e-9:
                    step_s = min(left_s * self.slow(clock()), 0.01)
                    left_s -= step_s / self.slow(clock())
                    await asyncio.sleep(step_s)
                self.device_s[key] = self.device_s.get(key, 0.0) + clock() - began
            return payloads

        batcher = Batcher[str, int, int](
            lambda key, payloads: work(key, payloads, 1.0, second),
            prepare=(lambda key, payloads: work(key, payloads, 0.5, first)) if self.num_stages == 2 else None,
            max_batch_size=8,
            max_queue_size=1000,
            batch_timeout_s=0.1,
            clock=clock,
        )
        for key, times in EXPECTED.items():
            batcher.speed.expect(key, times * BATCH_S[key] * 0.8, times * BATCH_S[key] * 0.2)
        batcher.start()
        admission = Admission(1000, clock)

        replies: list[tuple[Ask, int]] = []

        async def client(ask: Ask) -> None:
            await asyncio.sleep(ask.at)
            status = 200
            try:
                with admission.permit(1, ask.within_s):
                    await batcher.submit(ask.key, [0], clock() + ask.within_s, lambda batched: batched.results)
            except ServerError as error:
                status = error.status
            replies.append((ask, status))

        await asyncio.gather(*map(client, asks))
        await asyncio.sleep(max(0.0, until - clock()))
        for ask in then:
            await client(ask)
        await batcher.close()
        return replies


KEYS = st.sampled_from(list(BATCH_S))
SPELLS = st.tuples(st.floats(0, 3), st.floats(0.05, 20), st.floats(1, 1000))
"""When a slow spell begins, how long it is, and how slow."""


def within(key: str) -> float:
    """Seconds that are enough for a lone request of a key at normal speed, with some slack."""
    return 5 * BATCH_S[key]


@settings(max_examples=100)
@given(
    spell=SPELLS,
    asked=st.lists(st.tuples(KEYS, st.booleans()), max_size=25),
    then=st.lists(st.tuples(st.floats(0, 2), KEYS), min_size=1, max_size=20),
    num_stages=st.integers(1, 2),
)
@example((0.0, 3.0, 1e6), [("learned", False)], [(0.0, "learned")], 1)  # the first batch of a key stands still
@example((0.0, 0.0, 1.0), [], [(0.0, "faster than measured")] * 20, 1)  # the server started on a busy machine
@example(  # what others took in the spell must not outweigh what a key took since
    (0.0, 2.0, 14.0), [("measured", False)] * 2, [(0.0, "faster than measured"), (0.5, "faster than measured")], 1
)
def test_an_idle_device_answers_a_second_after_a_slow_spell(
    spell: tuple[float, float, float],
    asked: list[tuple[str, bool]],
    then: list[tuple[float, str]],
    num_stages: int,
) -> None:
    begin, length, factor = spell
    world = World(lambda now: factor if begin <= now < begin + length else 1.0, num_stages)
    during = [
        Ask(0.3 * index, key, within(key) if hurried else PATIENT_S) for index, (key, hurried) in enumerate(asked)
    ]
    after = [Ask(pause, key, within(key)) for pause, key in then]
    over = begin + length + 0.6  # batches that were under way in the spell are done by then
    replies = world.serve(during, over + TRY_AFTER_S, after)
    assert [(ask, status) for ask, status in replies[len(during) :] if status != 200] == []


@settings(max_examples=10)
@given(
    spell=st.tuples(st.floats(0, 3), st.floats(0.05, 8), st.floats(1, 1000)),
    load=st.floats(0.1, 0.5),
    seed=st.integers(0, 1000),
    num_stages=st.integers(1, 2),
)
def test_a_device_that_has_other_work_answers_soon_after_a_slow_spell(
    spell: tuple[float, float, float], load: float, seed: int, num_stages: int
) -> None:
    begin, length, factor = spell
    random, keys = Random(seed), list(BATCH_S)
    # What piled up in the spell is done by then, and each key was tried.
    healed = begin + 3 * length + len(keys) * LONGEST_TRY_PAUSE_S
    world = World(lambda now: factor if begin <= now < begin + length else 1.0, num_stages)
    arrivals = poisson(load / max(BATCH_S.values()), healed + 10, seed)
    asks = [Ask(at, random.choice(keys), random.choice([1.0, PATIENT_S])) for at in arrivals]
    replies = world.serve(asks)
    assert [(ask, status) for ask, status in replies if ask.at > healed and status != 200] == []


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), hopeless=st.sampled_from(list(BATCH_S)), num_stages=st.integers(1, 2))
def test_a_device_that_stays_slow_is_not_kept_busy_by_what_it_cannot_do_in_time(
    seed: int, hopeless: str, num_stages: int
) -> None:
    world = World(lambda now: 10.0, num_stages)
    others = [key for key in BATCH_S if key != hopeless]
    asks = [Ask(at, Random(at).choice(others), 20.0) for at in poisson(1.0, 60, seed)]
    asks += [Ask(at, hopeless, BATCH_S[hopeless]) for at in poisson(5.0, 60, seed + 1)]
    replies = world.serve(asks)
    assert all(status == 200 for ask, status in replies if ask.key != hopeless)
    assert world.device_s[hopeless] <= 0.4 * 60  # it is tried once a second while nothing else waits


@settings(max_examples=20)
@given(length=st.floats(0.5, 10), factor=st.floats(1, 100), num_asked=st.integers(1, 20))
@example(length=5.0, factor=8.0, num_asked=20)
def test_the_dial_comes_down_again_after_a_slow_spell(length: float, factor: float, num_asked: int) -> None:
    steps = [Rung((0,), 0.08, 0.02, 1.0), Rung((8,), 0.04, 0.01, 0.9), Rung((16,), 0.01, 0.005, 0.8)]
    cost = {step.schedule: step for step in steps}

    async def serve() -> list[Schedule]:
        clock = asyncio.get_running_loop().time

        async def device(key: BatchKey, payloads: Sequence[int]) -> Sequence[int]:
            await asyncio.sleep(cost[key.schedule].batch_s(len(payloads)) * (factor if clock() < length else 1.0))
            return payloads

        batcher = Batcher[BatchKey, int, int](
            device, max_batch_size=8, max_queue_size=1000, batch_timeout_s=0.1, clock=clock
        )
        auto = AutoDial(lambda schedule: BatchKey("tiny", schedule, (8, 8)), steps, batcher.speed, clock)
        batcher.start()

        async def ask(within_s: float) -> Schedule:
            key = auto.open(AutoR())
            return await batcher.submit(key, [0], clock() + within_s, lambda batched: batched.key.schedule)

        await asyncio.gather(*(ask(PATIENT_S * factor) for _ in range(num_asked)))
        await asyncio.sleep(max(0.0, length - clock()) + 1.01 * TRY_AFTER_S)
        answers = []
        for _ in range(60):
            answers.append(await ask(0.5))
            await asyncio.sleep(0.5)
        await batcher.close()
        return answers

    assert _in_virtual_time(serve())[-10:] == [(0,)] * 10
