"""Forward and backward passes as CUDA graphs, one for each `r`.

A model this small is bound by kernel launches: eagerly a step of 512 images takes several times the device's time.
Token counts depend only on `r`, so every step under one `r` is the same graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from training.parallel import say


class Backward(Protocol):
    """From `r`, images and the teacher's answer to the loss; leaves gradients in the parameters."""

    def __call__(self, r: int, images: Tensor, *taught: Tensor) -> Tensor: ...


class Replay:
    """Replays a backward pass. The first call fixes the shapes of its inputs and captures a graph for every `r`.

    Captured gradients stay at their first address, so the caller must zero them in place, never drop them.

    Args:
        backward: The function to capture; it allocates nothing that outlives it except gradients, and draws no random
            numbers.
        ladder: All values of `r`.
    """

    def __init__(self, backward: Backward, ladder: Sequence[int]) -> None:
        self._backward, self._ladder = backward, ladder
        self._held: list[Tensor] = []
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, r: int, images: Tensor, *taught: Tensor) -> Tensor:
        if not self._graphs:
            self._capture([tensor.clone() for tensor in (images, *taught)])
        for held, given in zip(self._held, (images, *taught), strict=True):
            held.copy_(given)
        graph, loss = self._graphs[r]
        graph.replay()
        return loss

    def _capture(self, held: list[Tensor]) -> None:
        self._held, pool = held, torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        for r in self._ladder:
            for _ in range(2):  # compiles and warms up, outside of the graph
                self._backward(r, *held)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls may invalidate the capture, because NCCL's watchdog thread continues meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                loss = self._backward(r, *held)
            self._graphs[r] = graph, loss
            say(f"captured r={r}")
