"""Work beside the main stream while a CUDA graph is captured: its kernels then run at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def beside(device: torch.device) -> Iterator[Callable[[], None]]:
    """Captures what the block launches on a side stream; the function it gives makes the main stream wait for it.

    Tensors that the block reads or makes must live until then. Outside of a capture everything stays in line: there the
    launches, not the kernels, would pay for it.
    """
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
