"""`r` in text, JSON or YAML: parsed, checked against a model, and turned into a schedule."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from typing import Any

from server.errors import InvalidError, shown
from tome_core.schedule import Ramp, resolve

Schedule = tuple[int, ...]
"""`r` of each block of a model."""

PlainR = int | Schedule
"""A fixed `r`: a number for all blocks, or a list with one for each block."""


@dataclass(frozen=True, slots=True)
class AutoR:
    """`r=auto`: the smallest `r` that keeps deadlines under the present load, within bounds.

    Attributes:
        max_r: Most tokens that a block may merge; None for any number.
        min_agreement: Least expected agreement with r=0; None for any.
    """

    max_r: int | None = None
    min_agreement: float | None = None


MOST_MAX_R = 2**31 - 1
"""The highest bound of `auto`. It may exceed what the model can merge, but Python limits the digits of an
integer.
"""

RSetting = PlainR | AutoR
"""A deployment's `r` as people set it."""


def parse_setting(value: object, max_r: object = None, min_agreement: object = None) -> RSetting:
    """Parses an `r` like `parse_r`, or "auto" with its bounds.

    Raises:
        InvalidError: It is neither, a bound is out of range, or a fixed `r` has bounds.
    """
    if value != "auto":
        if max_r is not None or min_agreement is not None:
            raise InvalidError(f"max_r and min_agreement go with r=auto, not with r={shown(value)}")
        return parse_r(value)
    if max_r is not None and (not isinstance(max_r, int) or isinstance(max_r, bool) or not 0 <= max_r <= MOST_MAX_R):
        raise InvalidError(f"max_r is {shown(max_r)}; it must be an integer from 0 to {MOST_MAX_R}")
    if min_agreement is not None and (
        not isinstance(min_agreement, int | float) or isinstance(min_agreement, bool) or not 0 <= min_agreement <= 1
    ):
        raise InvalidError(f"min_agreement is {shown(min_agreement)}; it must lie between 0 and 1")
    return AutoR(max_r, min_agreement)


def setting_to_json(r: RSetting) -> int | list[int] | dict[str, Any]:
    """A setting as it is stored and sent: a number, a list, or the bounds of `auto`."""
    if isinstance(r, AutoR):
        return asdict(r)
    return r if isinstance(r, int) else list(r)


def setting_from_json(value: Any) -> RSetting:
    """Parses a setting that `setting_to_json` wrote.

    Raises:
        InvalidError: It is something else.
    """
    if isinstance(value, dict):
        return parse_setting("auto", value.get("max_r"), value.get("min_agreement"))
    return parse_r(value)


def parse_r(value: object) -> PlainR:
    """Parses `8`, `"8"`, `[16, 14]`, `"[16,14]"` or `"16,14"`.

    Raises:
        InvalidError: It is something else, or holds a negative number.
    """
    said = value
    if isinstance(value, str):
        try:
            value = json.loads(value if value.lstrip().startswith("[") or "," not in value else f"[{value}]")
        except (ValueError, RecursionError):
            value = None
    is_list = isinstance(value, list | tuple)
    numbers: tuple[Any, ...] = tuple(value) if is_list else (value,)  # type: ignore[arg-type]
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise InvalidError(
            f"r is {shown(said)}; it must be an integer from 0, a list of one integer per block, or 'auto'"
        )
    return numbers if is_list else int(numbers[0])


@functools.lru_cache(4096)
def schedule_of(r: PlainR, num_blocks: int, max_r: int, inflect: float | None = None) -> Schedule:
    """The `r` of each block of a model with `num_blocks` blocks.

    Raises:
        InvalidError: A number is above `max_r`, the list is too long, or `inflect` does not fit.
    """
    numbers = (r,) if isinstance(r, int) else r
    if max(numbers) > max_r:
        raise InvalidError(f"r is {shown(r)}; each r must lie between 0 and {max_r} for this model", max_r=max_r)
    if len(numbers) > num_blocks:
        raise InvalidError(f"r lists {len(numbers)} blocks; this model has {num_blocks}", num_blocks=num_blocks)
    if inflect is None:
        return resolve(r, num_blocks)
    if not isinstance(r, int) or not -1 <= inflect <= 1:
        raise InvalidError(f"inflect is {inflect:g}; it must lie between -1 and 1, beside a single r")
    # The steep end of a ramp may exceed what a block can merge. It is clipped, as in the paper.
    return tuple(min(number, max_r) for number in Ramp(r, inflect).per_block(num_blocks))


def r_of(schedule: Schedule) -> PlainR:
    """The shortest form of a schedule: one number if all blocks merge alike."""
    return schedule[0] if len(set(schedule)) == 1 else schedule


def text_of(r: RSetting) -> str:
    """`8`, `8,4,0` or `auto`."""
    if isinstance(r, AutoR):
        return "auto"
    return str(r) if isinstance(r, int) else ",".join(map(str, r))


def label_of(schedule: Schedule) -> str:
    """A metric label from a closed set: the number if all blocks merge alike, else "schedule"."""
    r = r_of(schedule)
    return str(r) if isinstance(r, int) else "schedule"
