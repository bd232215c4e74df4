"""How sure a share of photos is: 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The interval of a share, hits out of count.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    share, z2 = hits / count, Z * Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[float, float, float]:
    """The share of `ours` less that of `theirs` on the same photos, and its interval.

    Source: Bonett and Price, Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data, Journal of Educational and Behavioral Statistics 2012.
    """
    pairs, count = list(zip(ours, theirs, strict=True)), len(ours)
    won, lost = pairs.count((True, False)), pairs.count((False, True))
    difference = (won - lost) / (count + 2)
    half = Z * math.sqrt(((won + lost + 2) / (count + 2) - difference**2) / (count + 2))
    return (won - lost) / count, difference - half, difference + half
