"""Work beside the main stream, so that small kernels run while large ones do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


WORTH_IT = 1 << 32
"""Multiplications of a square product of x from which on a second stream is worth the host's time, if not recorded."""


@contextmanager
def beside(x: Tensor) -> Iterator[Callable[[], None]]:
    """Launches what the block launches on a side stream; the function it gives makes the main stream wait for it.

    Where a CUDA graph is captured this costs nothing; where kernels are launched one by one it is done for large x
    alone. Tensors that the block reads must live until the main stream waits; what it makes may be read from then on.

    Args:
        x: What the block reads; its device and its size decide.
    """
    if x.device.type != "cuda" or torch.compiler.is_compiling() or not (x.numel() * x.shape[-1] >= WORTH_IT or _captured()):
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)


def _captured() -> bool:
    return torch.cuda.is_current_stream_capturing()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
