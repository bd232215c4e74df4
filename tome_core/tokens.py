"""Tokens on their way through a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tome_core.merging import unmerge

PADDING = torch.finfo(torch.float32).tiny
"""Size of a token that stands for nothing: no attention or mean notices it, and no division by it fails."""


class Tokens(NamedTuple):
    """Tokens on their way through the model.

    Attributes:
        x: Features, (B, N, C).
        size: How many input tokens each stands for, (B, N) float32; None while nothing has merged.
        source: Row that now holds each input token, (B, N0) int64; None when not tracked, or nothing has merged.
        padded: Whether some tokens are padding: those whose size is below 1.
    """

    x: Tensor
    size: Tensor | None = None
    source: Tensor | None = None
    padded: bool = False

    def unmerged(self) -> Tensor:
        """Features of every input token, in its place: (B, N0, C)."""
        return self.x if self.source is None else unmerge(self.x, self.source)
