"""JSON bodies as dicts. The number of values is checked before parsing; large bodies are parsed in a thread.

A few megabytes can hold a million values. As Python objects with an error each, they would take a hundred times the
memory and stop the event loop for seconds.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Container
from typing import Any

from fastapi import Request

from server.errors import InvalidError, TooLargeError, UndecodableError, shown

MOST_VALUES = 4096
"""Most values besides images: enough for the `r` of each block of many models."""

MOST_FIELDS = 256
"""Most fields of an object: enough for many models."""

LONGEST_NUMBER, LONGEST_TEXT = 400, 64 << 10
"""Most characters of a number, and of a text that is not an image."""

SMALL = 64 << 10
"""Bytes that are parsed at once: a thread would take longer."""

_SLICE = 1 << 20


async def read_json(request: Request, max_images: int = 0, images: Container[str] = ()) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        request: Its body is read.
        max_images: Most images, which may be texts of any length in a list.
        images: Names of fields, at any depth, that may hold an image as a text of any length.

    Raises:
        UndecodableError: The body is not a JSON object, or a number in it is too long.
        InvalidError: A field is repeated, an object has too many fields, or a text is too long.
        TooLargeError: There are too many values.
    """
    body = await request.body()
    if len(body) <= SMALL:
        return parse_object(body, max_images, images)
    return await asyncio.to_thread(parse_object, body, max_images, images)


def parse_object(body: bytes, max_images: int = 0, images: Container[str] = ()) -> dict[str, Any]:
    """Parses a JSON object; raises the errors of `read_json`."""
    check_values(body, MOST_VALUES + 2 * max_images)  # a data: prefix has a comma, too

    def read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return _object(pairs, images)

    try:
        said = json.loads(
            body, object_pairs_hook=read_object, parse_int=_integer, parse_float=_number, parse_constant=_no_number
        )
    except (ValueError, RecursionError) as error:
        raise UndecodableError(f"the body is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise UndecodableError('the body must be a JSON object, as in {"name": "value"}')
    return said


def check_values(body: bytes, most: int) -> None:
    """Raises TooLargeError if JSON holds more than `most` values.

    It counts commas: there is one between the values of lists and objects, and the parser bounds the nesting.
    """
    commas = 0
    for begin in range(0, len(body), _SLICE):  # other threads run in between
        commas += body.count(b",", begin, begin + _SLICE)
        if commas >= most:
            raise TooLargeError(f"the body holds more than {most} values", max_values=most)


def _object(pairs: list[tuple[str, Any]], images: Container[str]) -> dict[str, Any]:
    if len(pairs) > MOST_FIELDS:
        raise InvalidError(f"an object of the body has {len(pairs)} fields; at most {MOST_FIELDS} are allowed")
    for name, value in pairs:
        if isinstance(value, str) and len(value) > LONGEST_TEXT and name not in images:
            raise InvalidError(
                f"{shown(name)} is a text of {len(value)} characters; at most {LONGEST_TEXT} are allowed"
            )
    return without_repeats(pairs)


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Names and values as a dict; raises InvalidError for a repeated name."""
    said = dict(pairs)
    if len(said) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise InvalidError(f"{shown(name)}: given twice; give it once")
    return said


def _integer(text: str) -> int:
    return int(_of_sane_length(text))


def _number(text: str) -> float:
    return float(_of_sane_length(text))


def _of_sane_length(text: str) -> str:
    if len(text) > LONGEST_NUMBER:
        raise UndecodableError(f"a number of the body has {len(text)} digits; at most {LONGEST_NUMBER} are allowed")
    return text


def _no_number(text: str) -> float:
    raise UndecodableError(f"the body is not JSON: it has {text}")
