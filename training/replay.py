"""Forward and backward passes as CUDA graphs, one for each `r`.

A model this small is bound by kernel launches: eagerly a step of 512 images takes several times what the device
needs. Token counts depend on `r` alone, so that every step under one `r` is the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Backward = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
"""Images, targets, the teacher's logits or None, and r, to the loss; leaves gradients in the parameters."""


class Replay:
    """Replays a backward pass. The first call fixes the shapes of its inputs and captures a graph for every `r`.

    Captured gradients live where they were first written, so the caller must zero them in place, never drop them.

    Args:
        backward: What to capture; allocates nothing that outlives it but gradients.
        ladder: The values of `r` that will be asked for.
    """

    def __init__(self, backward: Backward, ladder: Sequence[int]) -> None:
        self._backward, self._ladder = backward, ladder
        self._inputs: list[Tensor | None] = []
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, images: Tensor, targets: Tensor, taught: Tensor | None, r: int) -> Tensor:
        if not self._graphs:
            self._capture([None if tensor is None else tensor.clone() for tensor in (images, targets, taught)])
        for held, given in zip(self._inputs, (images, targets, taught), strict=True):
            if held is not None and given is not None:
                held.copy_(given)
        graph, loss = self._graphs[r]
        graph.replay()
        return loss

    def _capture(self, inputs: list[Tensor | None]) -> None:
        self._inputs = inputs
        images, targets, taught = inputs
        assert images is not None and targets is not None
        pool = torch.cuda.graph_pool_handle()
        for r in self._ladder:
            for _ in range(2):  # compiles and warms up, outside of the graph
                self._backward(images, targets, taught, r)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                loss = self._backward(images, targets, taught, r)
            self._graphs[r] = graph, loss
            print(f"captured r={r}", flush=True)
