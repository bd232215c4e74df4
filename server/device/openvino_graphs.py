"""Compiled graphs of OpenVINO for any number of images: one by all threads, or several side by side, a thread each.

Threads that share one graph wait for each other after every operation, and wait longer on a busy machine. Side by side
they do not wait: on 2 cores 8 images at r=16 take a fifth less time, and a third less beside a busy HTTP process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tome_core.quiet import openvino

BATCH_SIZES = {"fp32": (1, 2, 4), "bf16": (1, 2, 4, 8, 16)}
"""Batch sizes of the graphs. In fp32 a thread is no faster with larger batches. In bf16 the layers are so fast that the
reading of their weights counts, and merging gains a sixth from 4 to 16."""

FEWER_BATCH_SIZES = {"fp32": (4,), "bf16": (4, 16)}
"""Batch sizes of graphs that are compiled in the background: nearly the same speed for less memory and time. The graph
for a single image computes the remainder of a batch, one image after the other."""

GRAPH_PER_WEIGHTS = 4
"""Memory of a compiled graph in either precision, as a multiple of the weights in float32: OpenVINO copies and reorders
them for every graph, and graphs share nothing. Measured: 2.5 for a lone one, 3.8 side by side."""

Run = Callable[[Tensor], Tensor]
"""Images (n, 3, H, W), float32 on the CPU, to outputs (n, K + C)."""


class AnyBatch:
    """One schedule for any number of images.

    Args:
        lone: Runs one image at a time, by all threads.
        side_by_side: For each batch size, runs any multiple of it, one batch at a time on each thread.
        threads: Number of threads.

    Attributes:
        graphs: Batch sizes and runs of all its graphs.
    """

    def __init__(self, lone: Run, side_by_side: Mapping[int, Run], threads: int) -> None:
        several = [(size, run) for size, run in side_by_side.items() if run is not lone]
        self.graphs: Sequence[tuple[int, Run]] = [(1, lone), *several]
        self._lone, self._side_by_side, self._threads = lone, side_by_side, threads

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) == 1:
            return self._lone(images)
        answers, start = [], 0
        for size, count in groups_of(len(images), list(self._side_by_side), self._threads):
            answers.append(self._side_by_side[size](images[start : start + size * count]))
            start += size * count
        return torch.cat(answers)


def any_batch(
    graph: Callable[[int, int], Run], threads: int, max_batch_size: int, batch_sizes: Sequence[int]
) -> AnyBatch:
    """Compiles the graphs for batches up to a size.

    Args:
        graph: Compiles a graph for a batch size and a number of batches that run side by side.
        threads: Number of threads.
        max_batch_size: Most images in a batch.
        batch_sizes: Sizes to compile for; sizes that no batch reaches are left out.
    """
    sizes = [size for size in batch_sizes if size <= max(1, math.ceil(max_batch_size / threads))]
    lone = graph(1, 1)
    if 1 in (threads, max_batch_size):
        sizes = [size for size in sizes if size != 1]
    return AnyBatch(lone, {1: lone} | {size: graph(size, threads) for size in sizes}, threads)


def groups_of(num_images: int, sizes: Sequence[int], threads: int) -> list[tuple[int, int]]:
    """Splits a batch into parts so that every thread gets one: (size, number of parts), the largest size first."""
    groups = []
    share = math.ceil(num_images / threads)
    for size in sorted((size for size in sizes if size <= share), reverse=True):
        count, num_images = divmod(num_images, size)
        if count:
            groups.append((size, count))
    return groups


def run_of(compiled: openvino.CompiledModel, batch_size: int, side_by_side: int) -> Run:
    """A compiled graph as a function of any multiple of its batch size."""
    queue = openvino.AsyncInferQueue(compiled, side_by_side)

    def keep(request: Any, place: tuple[list[Any], int]) -> None:
        answers, index = place
        answers[index] = torch.from_numpy(request.get_output_tensor(0).data.copy())

    queue.set_callback(keep)

    def run(images: Tensor) -> Tensor:
        parts = [part.numpy() for part in images.contiguous().split(batch_size)]
        answers: list[Any] = [None] * len(parts)
        for index, part in enumerate(parts):
            queue.start_async({0: part}, (answers, index), share_inputs=True)
        queue.wait_all()
        return torch.cat(answers)

    return run


def config_of(precision: str, threads: int, side_by_side: int) -> dict[str, Any]:
    """OpenVINO's settings for a precision ("fp32" or "bf16"), a number of threads, and batches side by side."""
    return {
        "INFERENCE_PRECISION_HINT": {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16}[precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": str(side_by_side),
    }
