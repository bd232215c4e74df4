"""Arithmetic that stays float32 or wider, whatever the model's dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast does not lower float32 arithmetic on `device`.

    `torch.set_float32_matmul_precision` is left to the caller: with "high" or "medium", products in here are rounded.
    """
    if device.type == "meta":  # has no autocast; asking torch which devices have it would break torch.compile's graph
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
