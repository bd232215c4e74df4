"""Batches that do not fit into memory: halved until they do, and the size is remembered for a while."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from prometheus_client import REGISTRY

from server.device.fitting import MOST_REMEMBERED, REMEMBERED_S, Fitting
from server.types import BatchKey
from tests.server.conftest import model_info

KEY = model_info().batch_key((0, 0, 0))
OTHER = model_info().batch_key((8, 8, 8))
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ...")


class Device:
    """Doubles numbers, as long as no batch is larger than `room`."""

    def __init__(self, room: int, error: Exception = GPU) -> None:
        self.room, self.error = room, error
        self.batches: list[int] = []
        self.now = 0.0
        self.fitting = Fitting(self.run, clock=lambda: self.now)

    def run(self, key: BatchKey, images: Sequence[int]) -> list[int]:
        self.batches.append(len(images))
        if len(images) > self.room:
            raise self.error
        return [2 * image for image in images]

    def ask(self, images: int, key: BatchKey = KEY) -> list[int]:
        """Runs so many images; gives the sizes of the batches that were tried."""
        before = len(self.batches)
        assert self.fitting(key, range(images)) == [2 * image for image in range(images)]
        return self.batches[before:]


def counted() -> float:
    return REGISTRY.get_sample_value("tome_out_of_memory_total") or 0.0


@pytest.mark.parametrize("error", [GPU, CPU, MemoryError()])
def test_a_batch_that_does_not_fit_is_halved_and_counted(error: Exception) -> None:
    before, device = counted(), Device(3, error)
    assert device.ask(10) == [10, 5, 2, 2, 2, 2, 2]
    assert counted() == before + 2


def test_the_size_that_fits_is_remembered_for_its_key_and_for_a_while() -> None:
    device = Device(4)
    assert device.ask(8) == [8, 4, 4]
    assert device.ask(7) == [4, 3]
    assert device.ask(3) == [3]
    assert device.ask(8, OTHER) == [8, 4, 4]
    device.room, device.now = 8, REMEMBERED_S
    assert device.ask(8) == [8]
    assert device.ask(6) == [6]


def test_one_image_that_does_not_fit_is_an_error_and_the_next_batch_is_tried_as_ever() -> None:
    device = Device(0)
    with pytest.raises(torch.OutOfMemoryError):
        device.ask(4)
    device.room = 4
    assert device.ask(2) == [1, 1]


def test_other_errors_are_not_taken_for_memory() -> None:
    device = Device(1, RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        device.ask(4)
    assert device.batches == [4]


def test_the_words_of_torch_are_known() -> None:
    device = Device(8)

    def run(key: BatchKey, images: Sequence[int]) -> list[int]:
        torch.empty(1 << 50 if len(images) > 1 else 1)
        return [2 * image for image in images]

    device.fitting = Fitting(run)
    device.ask(2)


def test_sizes_of_keys_that_clients_make_up_are_forgotten() -> None:
    device = Device(4)
    for number in range(MOST_REMEMBERED + 10):
        device.ask(5, model_info().batch_key((number, 0, 0)))
    assert len(device.fitting._fits) == MOST_REMEMBERED
    assert device.ask(5, model_info().batch_key((MOST_REMEMBERED, 0, 0))) == [2, 2, 1]
    assert device.ask(5, model_info().batch_key((0, 0, 0))) == [5, 2, 2, 1]  # it has to be found again
