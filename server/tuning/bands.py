"""The band of `r` that a model is tuned for: as people write it, or by default from its number of tokens."""

from __future__ import annotations

import re

from server.errors import SettingsError, shown
from server.types import ModelInfo

LOWEST, HIGHEST = 0.72, 1.1
"""Where the default band begins and ends, as shares of the patches that all blocks merge together. Below, merging costs
so little that there is nothing to give back; above, no patch is left before the last block."""

Band = tuple[int, int]
"""The smallest `r` and the largest."""


def default(info: ModelInfo) -> Band:
    """The band of a model: 12 to 18 where 12 blocks merge 196 patches.

    Raises:
        SettingsError: No token can merge in the model.
    """
    most = _most(info)
    per_block = (info.num_tokens - info.num_prefix_tokens) / info.num_blocks
    low, high = (min(max(1, round(share * per_block)), most) for share in (LOWEST, HIGHEST))
    return low, high


def parse(text: str, info: ModelInfo) -> Band:
    """Reads `12..18` or `16`.

    Raises:
        SettingsError: It is neither, or the model cannot merge like that.
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
