"""Recorded forward passes, with a recorder that repeats the function, and on a GPU with CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from server.device.graphs import SEEN_OFTEN, Graphs, buckets
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


def graphs(max_batch_size: int = 8, **kwargs: int) -> Graphs:
    return Graphs(logits, IMAGE, max_batch_size, Repeated, **kwargs)


def test_every_batch_size_gets_its_own_answers() -> None:
    recorded = graphs()
    for schedule in ((0, 0), (3, 1)):
        recorded.warm_up(schedule)
    assert len(recorded) == 2 * len(recorded.buckets)
    for size in (8, 3, 1, 5, 8, 2):
        for schedule in ((0, 0), (3, 1)):
            images = torch.randn(size, *IMAGE.shape)
            assert torch.equal(recorded(images, schedule), logits(images, schedule))


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


def test_the_recording_unused_for_longest_goes() -> None:
    recorded = graphs(max_batch_size=1, max_recordings=2)
    for schedule in ((1,), (2,), (1,), (3,)):
        recorded.warm_up(schedule)
    assert len(recorded) == 2
    images = torch.randn(1, *IMAGE.shape)
    for schedule in ((1,), (3,), (2,)):
        assert torch.equal(recorded(images, schedule), logits(images, schedule))


@pytest.mark.parametrize("most", [1, 2, 6, 8, 20, 32, 100])
def test_buckets_reach_from_one_to_the_most(most: int) -> None:
    sizes = buckets(most)
    assert sizes[0] == 1 and sizes[-1] == most and sizes == sorted(set(sizes))
    assert all(after <= 2 * before for before, after in zip(sizes, sizes[1:], strict=False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_answer_as_launches_do() -> None:
    image = torch.zeros(3, 4, 4, device="cuda")
    recorded = Graphs(logits, image, 4, CudaRecorder())
    recorded.warm_up((2,))
    images = torch.randn(3, 3, 4, 4, device="cuda")
    assert torch.equal(recorded(images, (2,)), logits(images, (2,)))
