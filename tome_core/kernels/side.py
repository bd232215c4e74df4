"""Work beside the main stream, so that small kernels run while large ones do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

WORTH_IT = 1 << 32
"""Multiplications of a square product of x from which on a second stream is worth the host's time, if not recorded."""


def is_recorded(x: Tensor) -> bool:
    """Whether what is done with x goes into a CUDA graph, where a second stream costs the host nothing."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def beside(x: Tensor) -> Iterator[Callable[[], None]]:
    """Launches what the block launches on a second stream; the function it gives makes the main stream wait for it.

    Tensors that the block reads must live until the main stream waits; what it makes may be read from then on. Where
    a stream is not worth it, all stays in line.

    Args:
        x: What the block reads; its device and its size decide.
    """
    worth_it = x.device.type == "cuda" and x.numel() * x.shape[-1] >= WORTH_IT
    if not worth_it and not is_recorded(x):
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
