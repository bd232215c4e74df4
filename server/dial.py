"""The dial as callers write it: text, JSON or YAML for `r`, checked against a model and turned into a schedule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from server.errors import InvalidError
from tome_core.schedule import Ramp, resolve

Schedule = tuple[int, ...]
"""`r` for each block of a model."""

RSetting = int | Schedule
"""A deployment's `r` as people set it: a number for all blocks, or a list of one per block."""


def parse_r(value: object) -> RSetting:
    """Reads `8`, `"8"`, `[16, 14]`, `"[16,14]"` or `"16,14"`.

    Raises:
        InvalidError: It is none of these, or holds a negative number.
    """
    said = value
    if isinstance(value, str):
        try:
            value = json.loads(value if value.lstrip().startswith("[") or "," not in value else f"[{value}]")
        except ValueError:
            value = None
    is_list = isinstance(value, list | tuple)
    numbers: tuple[Any, ...] = tuple(value) if is_list else (value,)  # type: ignore[arg-type]
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise InvalidError(f"r is {said!r}; it must be an integer from 0, or a list of one integer per block", r=said)
    return numbers if is_list else int(numbers[0])


def schedule_of(r: RSetting, num_blocks: int, max_r: int, inflect: float | None = None) -> Schedule:
    """The `r` of each block, for a model with so many blocks.

    Raises:
        InvalidError: A number is above `max_r`, the list is too long, or `inflect` does not fit.
    """
    asked: RSetting | Ramp = r
    if inflect is not None:
        if not isinstance(r, int) or not -1 <= inflect <= 1:
            raise InvalidError(
                f"inflect is {inflect:g}; it must lie between -1 and 1, beside a single r", inflect=inflect
            )
        asked = Ramp(r, inflect)
    if isinstance(r, tuple) and len(r) > num_blocks:
        raise InvalidError(f"r lists {len(r)} blocks; this model has {num_blocks}", num_blocks=num_blocks)
    schedule = resolve(asked, num_blocks)
    if isinstance(r, int) and r > max_r or max(schedule, default=0) > max_r and inflect is None:
        raise InvalidError(f"r is {_text(r)}; each r must lie between 0 and {max_r} for this model", r=r, max_r=max_r)
    return schedule


def r_of(schedule: Schedule) -> RSetting:
    """The shortest way to say a schedule: one number where all blocks merge alike."""
    return schedule[0] if len(set(schedule)) == 1 else schedule


def label_of(schedule: Schedule) -> str:
    """A metric label from a closed set: the number where all blocks merge alike, else "schedule"."""
    r = r_of(schedule)
    return str(r) if isinstance(r, int) else "schedule"


def _text(r: int | Sequence[int]) -> str:
    return str(r) if isinstance(r, int) else ",".join(map(str, r))
