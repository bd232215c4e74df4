"""Confidence intervals of shares, 95 % by default."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964


def wilson(hits: float, count: float, z: float = Z) -> tuple[float, float]:
    """The interval of a share, hits out of count, `z` standard deviations to each side.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    share, z2 = hits / count, z * z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def of_mean(shares: Sequence[float]) -> tuple[float, float]:
    """The interval of the mean of numbers from 0 to 1.

    It is the interval of a share whose mean varies as much: never of fewer trials than there are numbers, and of
    exactly as many if all numbers are 0 or all are 1.
    """
    count: float = len(shares)
    mean = sum(shares) / count
    variance = sum((share - mean) ** 2 for share in shares) / count
    if variance > 0:
        count = count * mean * (1 - mean) / variance
    return wilson(mean * count, count)


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[float, float, float]:
    """The share of `ours` minus that of `theirs` on the same photos, and the ends of its interval.

    Only photos on which the two differ count; half a photo is added to each of the four cells.

    Source: Agresti and Min, Simple improved confidence intervals for comparing matched proportions, 2005.
    """
    pairs, n = list(zip(ours, theirs, strict=True)), len(ours) + 2
    won, lost = pairs.count((True, False)), pairs.count((False, True))
    centre = (won - lost) / n
    half = Z * math.sqrt(((won + lost + 1) / n - centre**2) / n)
    return (won - lost) / len(ours), centre - half, centre + half
