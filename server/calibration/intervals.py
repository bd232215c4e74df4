"""How sure a share of photos is: 95 % intervals."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

Z = 1.959964
RESAMPLES = 2000


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The interval of a share, hits out of count.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    share, z2 = hits / count, Z * Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool], seed: int = 0) -> tuple[float, float, float]:
    """The share of `ours` less that of `theirs` on the same photos, and its bootstrap interval over photos."""
    differences = [int(our) - int(their) for our, their in zip(ours, theirs, strict=True)]
    count, random_numbers = len(differences), random.Random(seed)
    means = sorted(sum(random_numbers.choices(differences, k=count)) / count for _ in range(RESAMPLES))
    tail = int(0.025 * RESAMPLES)
    return sum(differences) / count, means[tail], means[-1 - tail]
