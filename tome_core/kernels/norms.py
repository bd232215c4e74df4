"""The parameters of a norm, for the kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """A LayerNorm, or an RMSNorm.

    Attributes:
        weight: (C,).
        bias: (C,), or None.
        eps: Added to the variance.
        centred: Whether the mean is subtracted first: in LayerNorm, but not in RMSNorm.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool = True
