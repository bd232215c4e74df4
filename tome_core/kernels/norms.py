"""What a norm is made of, as the kernels take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """A LayerNorm, or an RMSNorm.

    Attributes:
        weight: (C,).
        bias: (C,), or None.
        eps: Added to the variance.
        centred: Whether the mean is taken away first: LayerNorm does, RMSNorm does not.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool = True
