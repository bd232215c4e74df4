"""The dial as callers write it: text, JSON or YAML for `r`, checked against a model and turned into a schedule."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from typing import Any

from server.errors import InvalidError, shown
from tome_core.schedule import Ramp, resolve

Schedule = tuple[int, ...]
"""`r` for each block of a model."""

PlainR = int | Schedule
"""An `r` that stands: a number for all blocks, or a list of one per block."""


@dataclass(frozen=True, slots=True)
class AutoR:
    """`r=auto`: the smallest that keeps deadlines under the load of the moment, within bounds.

    Attributes:
        max_r: The most tokens that any block may merge, or None for any number.
        min_agreement: The least expected agreement with r=0, or None for any.
    """

    max_r: int | None = None
    min_agreement: float | None = None


MOST_MAX_R = 2**31 - 1
"""The highest bound of `auto`. It is stored whatever the model merges, and Python writes no integer of any length."""

RSetting = PlainR | AutoR
"""A deployment's `r` as people set it."""


def parse_setting(value: object, max_r: object = None, min_agreement: object = None) -> RSetting:
    """Reads what `parse_r` reads, or "auto" with its bounds.

    Raises:
        InvalidError: It is none of these, a bound is out of range, or there are bounds beside a fixed `r`.
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
    """What `setting_to_json` wrote.

    Raises:
        InvalidError: It did not write this.
    """
    if isinstance(value, dict):
        return parse_setting("auto", value.get("max_r"), value.get("min_agreement"))
    return parse_r(value)


def parse_r(value: object) -> PlainR:
    """Reads `8`, `"8"`, `[16, 14]`, `"[16,14]"` or `"16,14"`.

    Raises:
        InvalidError: It is none of these, or holds a negative number.
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
    """The `r` of each block, for a model with so many blocks.

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
    # The steep end of a ramp may pass what a block can merge: it is clipped, as the paper does.
    return tuple(min(number, max_r) for number in Ramp(r, inflect).per_block(num_blocks))


def r_of(schedule: Schedule) -> PlainR:
    """The shortest way to say a schedule: one number where all blocks merge alike."""
    return schedule[0] if len(set(schedule)) == 1 else schedule


def text_of(r: RSetting) -> str:
    """`8`, `8,4,0` or `auto`."""
    if isinstance(r, AutoR):
        return "auto"
    return str(r) if isinstance(r, int) else ",".join(map(str, r))


def label_of(schedule: Schedule) -> str:
    """A metric label from a closed set: the number where all blocks merge alike, else "schedule"."""
    r = r_of(schedule)
    return str(r) if isinstance(r, int) else "schedule"
