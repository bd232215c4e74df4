"""The number of tokens that each block merges, from `r`, a list or a ramp. Pure Python, no torch.

Token counts depend on the schedule and the model alone, never on an image, so batches stay rectangular.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Rounding = Literal["exact", "published"]


@dataclass(frozen=True)
class Ramp:
    """A schedule that runs linearly from `r * (1 - inflect)` in the first block to `r * (1 + inflect)` in the last.

    Attributes:
        r: Mean number of tokens merged in a block.
        inflect: -1 merges 2r first and 0 last, 0 is constant, 1 merges 0 first and 2r last.
        rounding: "exact" keeps the sum at `r * num_blocks`; "published" truncates every block as the published
            implementation does, which merges fewer (151 of 156 for r=13, inflect=-1, 12 blocks).

    Raises:
        ValueError: `r` is negative, or `inflect` or `rounding` is outside its range.

    Source: Bolya et al., Token Merging, ICLR 2023, section 4.2 (constant and decreasing schedules).
    """

    r: int
    inflect: float = -1.0
    rounding: Rounding = "exact"

    def __post_init__(self) -> None:
        _checked(self.r)
        if not -1 <= self.inflect <= 1:
            raise ValueError(f"inflect is {self.inflect}; it must lie between -1 and 1")
        if self.rounding not in ("exact", "published"):
            raise ValueError(f"rounding is {self.rounding!r}; it must be 'exact' or 'published'")

    def per_block(self, num_blocks: int) -> tuple[int, ...]:
        """Gives the tokens to merge in each of `num_blocks` blocks."""
        if self.rounding == "published":
            if num_blocks == 1:
                return (self.r,)
            first = int(self.r * (1.0 - self.inflect))
            step = 2 * (self.r - first) / (num_blocks - 1)
            return tuple(int(first + step * i) for i in range(num_blocks))
        # r * (1 + inflect * (2 i / (num_blocks - 1) - 1)), as fractions: floats would lose a token here and there.
        slope = self.r * Fraction(self.inflect)
        wanted = [self.r + slope * Fraction(2 * i - num_blocks + 1, max(num_blocks - 1, 1)) for i in range(num_blocks)]
        counts = [int(value) for value in wanted]
        # Largest remainders are rounded up: the sum is kept and the ramp stays monotone.
        missing = self.r * num_blocks - sum(counts)
        by_remainder = sorted(range(num_blocks), key=lambda i: counts[i] - wanted[i])
        for i in by_remainder[:missing]:
            counts[i] += 1
        return tuple(counts)


RLike = int | Sequence[int] | Ramp
"""The `r` of a caller: one number for every block, a list of one per block (short lists end in zeros), or a ramp."""


def resolve(r: RLike, num_blocks: int) -> tuple[int, ...]:
    """Converts the `r` of a caller to one number per block, before clipping.

    Raises:
        ValueError: A number is negative, or a list is longer than the model has blocks.
        TypeError: `r` is neither an integer, a sequence of integers nor a `Ramp`.
    """
    if isinstance(r, Ramp):
        return r.per_block(num_blocks)
    if isinstance(r, tuple) and [type(part) for part in r] == [int, float]:  # as the published implementation has it
        raise TypeError(f"r is {r}; a ramp is Ramp({r[0]}, inflect={r[1]}, rounding='published')")
    if isinstance(r, Sequence) and not isinstance(r, str | bytes):
        if len(r) > num_blocks:
            raise ValueError(f"the schedule lists {len(r)} blocks; this model has {num_blocks}")
        return tuple(_checked(value) for value in r) + (0,) * (num_blocks - len(r))
    return (_checked(r),) * num_blocks


def mean_r(schedule: Sequence[int]) -> int:
    """The single `r` of a schedule: its mean over all blocks, halves rounded up."""
    return (2 * sum(schedule) + len(schedule)) // (2 * len(schedule))


def max_r(num_tokens: int, num_prefix_tokens: int) -> int:
    """The most tokens that one block can merge: half of those that are not prefix tokens (ToMe, section 3)."""
    return max(num_tokens - num_prefix_tokens, 0) // 2


def clip(schedule: Sequence[int], num_tokens: int, num_prefix_tokens: int) -> tuple[int, ...]:
    """Lowers each block's `r` to what its remaining tokens allow, as the paper does."""
    clipped = []
    for r in schedule:
        r = min(r, max_r(num_tokens, num_prefix_tokens))
        clipped.append(r)
        num_tokens -= r
    return tuple(clipped)


def token_counts(schedule: Sequence[int], num_tokens: int, num_prefix_tokens: int) -> tuple[int, ...]:
    """Tokens entering the first block, then tokens leaving each block: `len(schedule) + 1` numbers."""
    counts = [num_tokens]
    for r in clip(schedule, num_tokens, num_prefix_tokens):
        counts.append(counts[-1] - r)
    return tuple(counts)


def _checked(r: object) -> int:
    try:
        number = operator.index(r)  # type: ignore[arg-type]  # NumPy's integers too
    except TypeError:
        number = None
    if number is None or isinstance(r, bool):
        raise TypeError(f"r is {r!r}; it must be an integer, a list of integers or a Ramp")
    if number < 0:
        raise ValueError(f"r is {r}; it must be 0 or more")
    return number
