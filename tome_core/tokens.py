"""Tokens between the blocks of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tome_core.merging import unmerge

PADDING = torch.finfo(torch.float32).tiny
"""Size of a padding token: too small to affect attention or a mean, but not 0, so that divisions work."""


class Tokens(NamedTuple):
    """Tokens between the blocks of a model.

    Attributes:
        x: Features, (B, N, C).
        size: Number of input tokens in each, (B, N) float32; None while nothing has merged.
        source: Row that holds each input token, (B, N0) int64; None without tracking, or while nothing has merged.
        padded: Whether some tokens are padding, with a size below 1.
    """

    x: Tensor
    size: Tensor | None = None
    source: Tensor | None = None
    padded: bool = False

    def unmerged(self) -> Tensor:
        """Features of every input token, in its place: (B, N0, C)."""
        return self.x if self.source is None else unmerge(self.x, self.source)
