"""The band of `r` that a model is tuned for: given as text, or by default from its number of tokens."""

from __future__ import annotations

import re

from server.errors import SettingsError, shown
from server.types import ModelInfo

LOWEST, HIGHEST = 0.72, 1.1
"""Ends of the default band, as shares of the patches that all blocks merge together. Below, merging costs so little
accuracy that there is nothing to recover; above, no patch is left before the last block.
"""

Band = tuple[int, int]
"""The smallest and the largest `r`."""


def default(info: ModelInfo) -> Band:
    """The default band of a model: 12 to 18 if 12 blocks merge 196 patches.

    Raises:
        SettingsError: The model cannot merge any token.
    """
    most = _most(info)
    per_block = (info.num_tokens - info.num_prefix_tokens) / info.num_blocks
    low, high = (min(max(1, round(share * per_block)), most) for share in (LOWEST, HIGHEST))
    return low, high


def parse(text: str, info: ModelInfo) -> Band:
    """Parses `12..18` or `16`.

    Raises:
        SettingsError: It has another form, or the model cannot merge so.
    """
    match = re.fullmatch(r"\s*(\d{1,9})(?:\s*\.\.\s*(\d{1,9}))?\s*", text, re.ASCII)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    most = _most(info)
    if not 1 <= low <= high <= most:
        raise SettingsError(f"--band is {shown(text)}; it must be LOW..HIGH, between 1 and {most} for this model")
    return low, high


def _most(info: ModelInfo) -> int:
    """The largest `r` of a model."""
    if info.max_r < 1:
        raise SettingsError(f"{info.name} has too few tokens to merge any; there is nothing to tune")
    return info.max_r
