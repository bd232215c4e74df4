"""Small tensors that depend only on a function's arguments: computed once, then kept.

A recorded graph cannot copy from the host, so such tensors must exist before it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


def kept(function: Callable[..., R]) -> Callable[..., R]:
    """Caches a function's result, a tensor or a tuple, by its arguments, except for tensors without data, as while
    tracing.
    """
    known: dict[tuple[Hashable, ...], R] = {}

    @wraps(function)
    def call(*args: Hashable) -> R:
        if torch.compiler.is_compiling():
            return function(*args)
        if args not in known:
            with torch.inference_mode(False):  # # the tensors may meet gradients later
                made = function(*args)
            parts = made if isinstance(made, tuple) else (made,)
            if any(isinstance(part, Tensor) and type(part) is not Tensor for part in parts):
                return made
            known[args] = made
        return known[args]

    return call
