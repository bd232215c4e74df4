"""What was found at a speed-up: one row for each schedule, the table of them, and the verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from server.dial import PlainR, Schedule, r_of, text_of

Kind = Literal["found", "even", "constant"]


@dataclass(frozen=True)
class ScheduleRow:
    """One schedule, as judged on the photos that it was not chosen on.

    Attributes:
        kind: Found by the search, merging spread evenly at the same cost, or the least constant r within it.
        cost: GFLOPs of one image, or milliseconds of a batch.
        agreement: Share of photos whose likeliest class is that at r=0.
        interval: Its 95 % interval.
        distance: Mean Hellinger distance of its answers from those at r=0, which the search makes small.
        gain: Agreement of the found schedule less this one's, and its 95 % interval; None for the found one itself.
    """

    speedup: float
    kind: Kind
    r: Schedule
    cost: float
    agreement: float
    interval: tuple[float, float]
    distance: float
    gain: tuple[float, float, float] | None


@dataclass(frozen=True)
class Verdict:
    """Which `r` to take at a speed-up, and why."""

    speedup: float
    take: PlainR
    why: str

    def __str__(self) -> str:
        return f"{self.speedup:.2f}x: take r={text_of(self.take)}. {self.why}"


def judge(found: ScheduleRow, even: ScheduleRow, constant: ScheduleRow) -> Verdict:
    """Recommends one `r` of a speed-up.

    The found list must gain agreement beyond its 95 % interval, both over the constant `r` and over merging that is
    spread evenly at the same cost. Otherwise it is the constant that is recommended.
    """
    plain = r_of(constant.r)
    for other, name in ((constant, f"r={text_of(plain)}"), (even, "merging that is spread evenly at the same cost")):
        assert other.gain is not None, "all rows but the found one have a gain"
        if other.r == found.r:
            return Verdict(found.speedup, plain, f"The search found nothing else than {name}.")
        _, low, high = other.gain
        if low <= 0:
            meaning = "it loses answers" if high < 0 else "that may be chance"
            why = f"The found list gains {_points(other.gain)} over {name}: {meaning}."
            return Verdict(found.speedup, plain, why)
    assert constant.gain is not None
    return Verdict(found.speedup, r_of(found.r), f"It gains {_points(constant.gain)} over r={text_of(plain)}.")


def print_table(rows: Sequence[ScheduleRow], unit: str) -> None:
    """Prints a line for each schedule."""
    measures = f"{unit:>8} {'agree % (95 %)':>20} {'distance':>8} {'found gains, points':>22}"
    print(f"{'speed-up':>8}  {'schedule':<9} {measures}  r")
    for row in rows:
        low, high = row.interval
        agree = f"{100 * row.agreement:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        gain = "" if row.gain is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * part for part in row.gain))
        speedup = f"{row.speedup:.2f}x" if row.kind == "found" else ""
        measures = f"{row.cost:>8.3f} {agree:>20} {row.distance:>8.4f} {gain:>22}"
        print(f"{speedup:>8}  {row.kind:<9} {measures}  {text_of(r_of(row.r))}")


def _points(gain: tuple[float, float, float]) -> str:
    return "{:+.1f} points ({:+.1f} to {:+.1f})".format(*(100 * part for part in gain))
