"""Work beside the main stream of a recording, so that small kernels run at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


def is_recorded(x: Tensor) -> bool:
    """Whether what is done with x goes into a CUDA graph."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def beside(x: Tensor) -> Iterator[Callable[[], None]]:
    """Launches what the block launches on a second stream; the function it gives makes the main stream wait for it.

    That is done in a recording alone, where it costs the host nothing: few images leave room for both on a GPU. What
    the block reads must live until the main stream waits; what it makes may be read from then on.

    Args:
        x: What the block reads.
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
