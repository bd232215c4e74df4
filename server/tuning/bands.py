"""The band of `r` that a model is tuned for, as people write it or as its tokens say."""

from __future__ import annotations

import re

from server.errors import shown
from server.settings import SettingsError
from server.types import ModelInfo

LOWEST, HIGHEST = 0.72, 1.1
"""Where the default band begins and ends, as shares of the patches that all blocks merge together. Below, merging costs
so little that there is nothing to give back; above, no patch is left before the last block."""

Band = tuple[int, int]
"""The smallest `r` and the largest."""


def default(info: ModelInfo) -> Band:
    """The band of a model: 12 to 18 where 12 blocks merge 196 patches."""
    per_block = (info.num_tokens - info.num_prefix_tokens) / info.num_blocks
    low = min(max(1, round(LOWEST * per_block)), max(1, info.max_r))
    return low, min(max(low, round(HIGHEST * per_block)), max(1, info.max_r))


def parse(text: str, info: ModelInfo) -> Band:
    """Reads `12..18` or `16`.

    Raises:
        SettingsError: It is neither, or the model cannot merge like that.
    """
    match = re.fullmatch(r"\s*(\d{1,9})(?:\s*\.\.\s*(\d{1,9}))?\s*", text, re.ASCII)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high <= info.max_r:
        raise SettingsError(f"--r is {shown(text)}; it must be LOW..HIGH, between 1 and {info.max_r} for this model")
    return low, high
