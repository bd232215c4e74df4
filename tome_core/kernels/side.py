"""A second stream in a recorded CUDA graph, so that small kernels run at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


def is_recorded(x: Tensor) -> bool:
    """Whether work on x is being recorded into a CUDA graph."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def beside(x: Tensor) -> Iterator[Callable[[], None]]:
    """Runs the block's kernels on a second stream; the yielded function makes the main stream wait for it.

    This happens only while a graph is recorded, where it costs the host nothing: with few images a GPU has room for
    both. The block's inputs must live until the main stream waits; its outputs may be read from then on.

    Args:
        x: Input of the block.
    """
    if not is_recorded(x):
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
