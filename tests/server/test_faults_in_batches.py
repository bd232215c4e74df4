"""Whatever breaks at whichever stage of a batch: the batch loop lives, and each request gets one answer."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.batching.auto import AutoDial
from server.batching.engine import LocalEngine
from server.errors import DeadlineError, EngineError, ServerError, UnavailableError
from server.ipc.messages import Answered, Classify, Explain
from tests.server.conftest import FakeDevice, class_of, classify, explain, model_info
from tests.server.test_local_engine import AUTO, REQUESTS, STEPS, check_answer, started

KINDS: list[Callable[[], BaseException]] = [
    lambda: ValueError("odd"),
    lambda: KeyError("key"),
    lambda: MemoryError(),
    lambda: RecursionError("deep"),
    lambda: OSError(28, "No space left on device"),
    lambda: TimeoutError(),
    lambda: StopIteration(),
    lambda: concurrent.futures.CancelledError(),
    lambda: concurrent.futures.BrokenExecutor("the pool broke"),
    lambda: ExceptionGroup("several", [ValueError("one"), OSError("two")]),
    lambda: DeadlineError("no answer within 1 s"),
    lambda: UnavailableError("not now"),
]
IN_THREADS = [*KINDS, lambda: SystemExit(3), lambda: asyncio.CancelledError(), lambda: GeneratorExit()]
"""What a library may raise in a thread of its own, beside an Exception."""


def _dials(engine: LocalEngine) -> list[AutoDial]:
    return [served.dial for served in engine._served._served.values()]


STAGES: dict[str, Callable[[LocalEngine, FakeDevice], list[tuple[Any, str]]]] = {
    "prepare": lambda engine, device: [(device, "prepare")],
    "compute": lambda engine, device: [(device, "compute")],
    "warm": lambda engine, device: [(device, "warm_further")],
    "choose": lambda engine, device: [(auto, "choose") for auto in _dials(engine)],
    "allow": lambda engine, device: [(auto, "expected_agreement") for auto in _dials(engine)],
    "note": lambda engine, device: [(auto, "_choice") for auto in _dials(engine)],
    "form": lambda engine, device: [(engine._batcher._queues, "_dues")],
    "estimate": lambda engine, device: [(engine._batcher._queues, "_may_try"), (engine._batcher.speed, "line")],
    "learn": lambda engine, device: [(engine._batcher.speed, "observe")],
    "answer": lambda engine, device: [(engine._drift, "offer")],
    "tell": lambda engine, device: [(engine._batcher._observer, name) for name in ("batch_ran", "job_dropped")],
    "drift": lambda engine, device: [(engine._drift, "_count")],
    "idle": lambda engine, device: [(engine._drift, "idle")],
}
"""Where a fault may come: the functions that are called there."""


@dataclass
class Faults:
    """Makes functions raise.

    Args:
        kinds: What is raised, call after call, as indices of a table of kinds; None lets a call pass.
    """

    kinds: list[int | None]
    num_calls: int = 0
    undo: list[Callable[[], None]] = field(default_factory=list)

    def put_into(self, owner: Any, name: str, table: list[Callable[[], BaseException]]) -> None:
        """Has a method of an object raise."""
        work = getattr(owner, name)

        def faulty(*args: Any, **options: Any) -> Any:
            self.num_calls += 1
            kind = self.kinds[self.num_calls - 1] if self.num_calls <= len(self.kinds) else None
            if kind is not None:
                raise table[kind % len(table)]()
            return work(*args, **options)

        setattr(owner, name, faulty)
        self.undo.append(lambda: delattr(owner, name))


FAULTS = st.dictionaries(
    st.sampled_from(list(STAGES)), st.lists(st.none() | st.integers(0, len(IN_THREADS) - 1), max_size=8), max_size=4
)


@settings(max_examples=200)
@given(
    asked=st.lists(REQUESTS, min_size=1, max_size=8),
    faults=FAULTS,
    batch=st.integers(1, 5),
    prepares=st.booleans(),
    is_auto=st.booleans(),
)
@example([classify(r=(1, 1, 1))], {"compute": [6]}, 1, False, False)  # a StopIteration, which no future carries
@example([classify(r=AUTO), explain(r=AUTO)], {"idle": [0, 0], "choose": [0]}, 1, False, True)
async def test_whatever_one_batch_raises_the_loop_lives_and_each_request_has_one_answer(
    asked: list[Classify | Explain], faults: dict[str, list[int | None]], batch: int, prepares: bool, is_auto: bool
) -> None:
    device = FakeDevice(prepares=prepares)
    models, deployed = [model_info(), model_info("other")], AUTO if is_auto else (2, 2, 2)
    options: dict[str, Any] = {"models": models, "r": deployed, "steps": {"tiny": STEPS}, "max_batch_size": batch}
    async with started(device, drift_sample=0.5, **options) as engine:
        undo = []
        for stage, kinds in faults.items():
            broken = Faults(kinds)
            for owner, name in STAGES[stage](engine, device):
                broken.put_into(owner, name, IN_THREADS if owner is device else KINDS)
            undo += broken.undo
        outcomes = await asyncio.gather(*(asyncio.wait_for(ask(engine, each), 5) for each in asked))
        for restore in undo:
            restore()
        for request, outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, Answered):
                check_answer(request, outcome, deployed)
            else:
                assert isinstance(outcome, ServerError)
        assert not engine._broken.is_set() and engine._batcher.num_waiting == 0
        await engine.check()
        after = await engine.answer(classify(b"after", (1, 1, 1)))
        assert after.results[0].indices == [class_of(b"after", (1, 1, 1))]


async def ask(engine: LocalEngine, request: Classify | Explain) -> Answered[Any] | ServerError:
    """The one answer to a request. What is raised at once is told as an error of the engine, as ipc/server.py does."""
    answers: list[asyncio.Future[Any]] = []
    try:
        future: asyncio.Future[Answered[Any]] = engine.answer(request)
    except Exception as error:
        return error if isinstance(error, ServerError) else EngineError(repr(error))
    future.add_done_callback(answers.append)
    try:
        return await future
    except ServerError as error:
        return error
    finally:
        await asyncio.sleep(0)
        assert answers == [future]


@pytest.mark.parametrize("stage", STAGES)
async def test_a_stage_that_fails_at_all_calls_costs_no_more_than_an_error_each(stage: str) -> None:
    device = FakeDevice(prepares=True)
    async with started(device, steps={"tiny": STEPS}, drift_sample=1.0) as engine:
        broken = Faults([0] * 1000)
        for owner, name in STAGES[stage](engine, device):
            broken.put_into(owner, name, KINDS)
        requests: list[Classify | Explain] = [
            classify(r=AUTO),
            explain(r=AUTO),
            classify(r=(4, 4, 4)),
            classify(r=AUTO),
            classify(),
        ]
        for _ in range(3):
            await asyncio.gather(*(asyncio.wait_for(ask(engine, each), 5) for each in requests))
        for restore in broken.undo:
            restore()
        assert isinstance(await ask(engine, classify()), Answered)
