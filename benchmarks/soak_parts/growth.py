"""The growth of a series: a line through it, with an interval that allows for autocorrelation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from server.intervals import Z

HOUR_S = 3600.0
LEAST_SAMPLES = 4
"""Fewest samples for an interval."""

MOST_ALIKE = 0.95
"""Largest assumed autocorrelation, because the estimate from a short series is poor."""


@dataclass(frozen=True)
class Growth:
    """The slope of a line through a series, as a share of the series' mean an hour.

    Attributes:
        percent_an_hour: The slope.
        low: The lower end of its 95 % interval.
        high: The upper end.
    """

    percent_an_hour: float
    low: float
    high: float

    def is_above(self, goal: float) -> bool:
        """Whether the series significantly grows faster than a goal, in percent an hour."""
        return self.low > goal

    def is_sure(self, goal: float) -> bool:
        """Whether the run was long enough to decide either way."""
        return self.low > goal or self.high <= goal


def growth_of(times_s: Sequence[float], values: Sequence[float]) -> Growth:
    """Fits a least squares line to a series.

    Samples of memory resemble those before them. The interval is therefore wider than that of independent samples: by
    the root of (1 + c) / (1 - c), with c the correlation of each residual with the next one.

    Args:
        times_s: Time of each sample.
        values: The samples; not negative.

    Raises:
        ValueError: There are fewer than four samples.

    Source: Bayley and Hammersley, The "effective" number of independent observations in an autocorrelated time series,
    1946.
    """
    n = len(times_s)
    if n < LEAST_SAMPLES:
        raise ValueError(f"{n} samples are too few for a slope; at least {LEAST_SAMPLES} are needed")
    mean_t, mean_v = math.fsum(times_s) / n, math.fsum(values) / n
    if mean_v == 0:
        return Growth(0.0, 0.0, 0.0)
    spread = math.fsum((t - mean_t) ** 2 for t in times_s)
    slope = math.fsum((t - mean_t) * (v - mean_v) for t, v in zip(times_s, values, strict=True)) / spread
    residuals = [v - mean_v - slope * (t - mean_t) for t, v in zip(times_s, values, strict=True)]
    squares = math.fsum(r * r for r in residuals)
    alike = math.fsum(a * b for a, b in zip(residuals, residuals[1:], strict=False)) / squares if squares else 0.0
    alike = min(max(alike, 0.0), MOST_ALIKE)
    half = Z * math.sqrt(squares / (n - 2) / spread * (1 + alike) / (1 - alike))
    scale = 100 * HOUR_S / mean_v
    return Growth(slope * scale, (slope - half) * scale, (slope + half) * scale)
