"""Arithmetic that stays float32 or wider, for any dtype of the model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast does not lower float32 arithmetic on `device`.

    It does not change `torch.set_float32_matmul_precision`: with "high" or "medium", its products are rounded.
    """
    # it has no autocast, and asking torch for the devices with autocast would break torch.compile's graph
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
