"""Recorded forward passes, with a recorder that repeats the function, and on a GPU with CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor

from server.device.graphs import MOST_SEEN, SEEN_OFTEN, Graphs, buckets
from tome_core.recorded import CudaRecorder

IMAGE = torch.zeros(3, 4, 4)


class Repeated:
    """Computes again what was recorded, into the same output."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self.output = compute()

    def replay(self) -> None:
        self.output.copy_(self._compute())


def logits(images: Tensor, schedule: tuple[int, ...]) -> Tensor:
    return images.flatten(1)[:, :5] * (1 + sum(schedule))


def graphs(max_batch_size: int = 8, **kwargs: Any) -> Graphs:
    return Graphs(logits, IMAGE, max_batch_size, Repeated, Lock(), **kwargs)


def test_every_batch_size_gets_its_own_answers() -> None:
    recorded = graphs()
    for schedule in ((0, 0), (3, 1)):
        recorded.warm_up(schedule, is_likely=schedule == (0, 0))
    while recorded.record_next():
        pass
    assert len(recorded) == 2 * len(recorded.buckets)
    for size in (8, 3, 1, 5, 8, 2):
        for schedule in ((0, 0), (3, 1)):
            images = torch.randn(size, *IMAGE.shape)
            assert torch.equal(recorded(images, schedule), logits(images, schedule))


def test_what_is_likely_first_is_recorded_first_and_the_rest_one_by_one() -> None:
    recorded = graphs(max_batch_size=8)
    recorded.warm_up((1,), is_likely=False)
    assert [size for size in recorded.buckets if recorded.has(size, (1,))] == [1, 8]
    assert recorded.record_next() and recorded.has(4, (1,)) and not recorded.has(2, (1,))
    assert recorded.record_next() and recorded.has(2, (1,))
    assert not recorded.record_next()
    recorded.warm_up((2,))
    assert all(recorded.has(size, (2,)) for size in range(1, 9)) and not recorded.record_next()


def test_what_cannot_be_recorded_is_launched_and_tried_ever_more_rarely() -> None:
    tries = []

    def refuse(compute: Callable[[], Tensor]) -> Repeated:
        tries.append(1)
        raise RuntimeError("somebody else is recording")

    recorded = Graphs(logits, IMAGE, 8, refuse, Lock())
    recorded.warm_up((1,), is_likely=False)
    assert len(recorded) == 0 and len(tries) == 2
    for _ in range(8 * SEEN_OFTEN - 1):
        images = torch.randn(3, *IMAGE.shape)
        assert torch.equal(recorded(images, (2,)), logits(images, (2,)))
    assert len(recorded) == 0 and len(tries) == 2 + 3  # after 3, 6 and 12


def test_threads_take_turns_at_the_held_images() -> None:
    recorded = graphs()
    recorded.warm_up((1,))

    def ask(number: int) -> bool:
        images = torch.full((8, *IMAGE.shape), float(number))
        return torch.equal(recorded(images, (1,)), logits(images, (1,)))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(ask, range(200)))


def test_nothing_is_recorded_while_another_thread_works_on_the_device() -> None:
    alone, held = Lock(), []

    def record(compute: Callable[[], Tensor]) -> Repeated:
        held.append(alone.locked())
        return Repeated(compute)

    recorded = Graphs(logits, IMAGE, 2, record, alone)
    recorded.warm_up((1,))
    assert held == [True, True] and not alone.locked()
    with alone:  # a replay needs nobody to be away
        images = torch.randn(2, *IMAGE.shape)
        assert torch.equal(recorded(images, (1,)), logits(images, (1,)))


def test_more_images_than_a_batch_may_have_are_launched() -> None:
    recorded = graphs(max_batch_size=4)
    recorded.warm_up((1,))
    for _ in range(2 * SEEN_OFTEN):
        images = torch.randn(5, *IMAGE.shape)
        assert not recorded.has(5, (1,))
        assert torch.equal(recorded(images, (1,)), logits(images, (1,)))
    assert len(recorded) == len(recorded.buckets)


def test_an_answer_outlives_the_next_replay() -> None:
    recorded = graphs()
    recorded.warm_up((1,))
    images = torch.randn(2, *IMAGE.shape)
    first = recorded(images, (1,))
    recorded(torch.randn(2, *IMAGE.shape), (1,))
    assert torch.equal(first, logits(images, (1,)))


def test_a_schedule_that_nobody_warmed_is_answered_at_once_and_recorded_when_it_comes_often() -> None:
    recorded = graphs()
    for batch in range(SEEN_OFTEN + 2):
        images = torch.randn(3, *IMAGE.shape)
        assert len(recorded) == (batch >= SEEN_OFTEN)
        assert torch.equal(recorded(images, (7,)), logits(images, (7,)))


def ask(recorded: Graphs, schedule: tuple[int, ...], times: int) -> None:
    for _ in range(times):
        images = torch.randn(1, *IMAGE.shape)
        assert torch.equal(recorded(images, schedule), logits(images, schedule))


@pytest.mark.parametrize("bound", ["count", "memory"])
def test_the_recording_used_least_makes_room_and_warmed_ones_stay(bound: str) -> None:
    """`has_room` as the device would say it, of memory that each recording takes a part of."""
    recorded: Graphs
    if bound == "count":
        recorded = graphs(max_batch_size=1, max_recordings=3)
    else:
        recorded = Graphs(logits, IMAGE, 1, Repeated, Lock(), lambda: len(recorded) < 3)
    recorded.warm_up((1,))
    ask(recorded, (2,), 20)
    ask(recorded, (3,), SEEN_OFTEN + 1)
    assert recorded.has(1, (2,)) and recorded.has(1, (3,))
    for number in range(10, 60):  # which one client makes up
        ask(recorded, (number,), SEEN_OFTEN)
    assert [recorded.has(1, (schedule,)) for schedule in (1, 2, 3)] == [True, True, True]
    ask(recorded, (4,), 4 * SEEN_OFTEN)  # what is used more takes the place of what is used less
    assert [recorded.has(1, (schedule,)) for schedule in (1, 2, 3, 4)] == [True, True, False, True]
    assert len(recorded) == 3


def test_without_memory_only_what_is_warmed_is_recorded() -> None:
    recorded = Graphs(logits, IMAGE, 1, Repeated, Lock(), lambda: False)
    recorded.warm_up((1,))
    ask(recorded, (2,), 50)
    assert len(recorded) == 1 and recorded.has(1, (1,))


def test_schedules_that_clients_make_up_are_counted_and_forgotten() -> None:
    recorded = graphs(max_batch_size=1)
    images = torch.randn(1, *IMAGE.shape)
    for number in range(MOST_SEEN):
        recorded(images, (number,))
    recorded(images, (0,))  # twice, and now the latest
    recorded(images, (MOST_SEEN,))
    assert len(recorded._seen) == MOST_SEEN
    recorded(images, (1,))  # it was forgotten: once
    assert len(recorded) == 0
    recorded(images, (0,))
    assert len(recorded) == 1


@pytest.mark.parametrize("most", [1, 2, 6, 8, 20, 32, 100])
def test_buckets_reach_from_one_to_the_most(most: int) -> None:
    sizes = buckets(most)
    assert sizes[0] == 1 and sizes[-1] == most and sizes == sorted(set(sizes))
    assert all(after <= 2 * before for before, after in zip(sizes, sizes[1:], strict=False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_answer_as_launches_do() -> None:
    image = torch.zeros(3, 4, 4, device="cuda")
    recorded = Graphs(logits, image, 4, CudaRecorder(), Lock())
    recorded.warm_up((2,))
    images = torch.randn(3, 3, 4, 4, device="cuda")
    assert torch.equal(recorded(images, (2,)), logits(images, (2,)))
