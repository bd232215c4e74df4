"""Small tensors that follow from their arguments alone: made once, and kept.

A recorded graph can copy nothing from the host, so what is made there must be there before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache, wraps
from typing import TypeVar

import torch

R = TypeVar("R")


def kept(function: Callable[..., R]) -> Callable[..., R]:
    """Keeps what a function gives, by its arguments; not while something is traced, whose tensors hold no data."""
    cached = cache(function)

    @wraps(function)
    def call(*args: Hashable) -> R:
        if torch.compiler.is_compiling():
            return function(*args)
        with torch.inference_mode(False):  # what is kept may meet gradients later
            return cached(*args)

    return call
