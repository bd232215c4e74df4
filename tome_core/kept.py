"""Small tensors that follow from their arguments alone: made once, and kept.

A recorded graph can copy nothing from the host, so what is made there must be there before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


def kept(function: Callable[..., R]) -> Callable[..., R]:
    """Keeps what a function gives, a tensor or a tuple, by its arguments; not what holds no data, as while tracing."""
    known: dict[tuple[Hashable, ...], R] = {}

    @wraps(function)
    def call(*args: Hashable) -> R:
        if torch.compiler.is_compiling():
            return function(*args)
        if args not in known:
            with torch.inference_mode(False):  # what is kept may meet gradients later
                made = function(*args)
            parts = made if isinstance(made, tuple) else (made,)
            if any(isinstance(part, Tensor) and type(part) is not Tensor for part in parts):
                return made
            known[args] = made
        return known[args]

    return call
