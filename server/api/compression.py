"""Compressed bodies, by gzip and deflate (RFC 9110, 8.4.1): inflated within a limit, and made where a client asks."""

from __future__ import annotations

import zlib

from server.errors import UndecodableError

_WINDOW = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""What zlib calls them."""

_FAST = 1
_WORTH_IT = 1 << 10
"""Bytes from which on an answer is compressed: a shorter one takes one packet either way."""


class Inflater:
    """Inflates one body, piece by piece.

    Args:
        encoding: "gzip" or "deflate".
    """

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._inflating = zlib.decompressobj(_WINDOW[encoding])

    def feed(self, piece: bytes, most: int, is_last: bool) -> bytes:
        """What a piece of the body holds.

        Args:
            piece: As it came.
            most: Bytes of the result, from 1 on: it is cut off there, so that a small body cannot fill the memory.
            is_last: Nothing comes after it.

        Raises:
            UndecodableError: The body is not compressed like that, or does not end where its data does.
        """
        inflating = self._inflating
        try:
            inflated = inflating.decompress(piece, most)
        except zlib.error as error:
            raise UndecodableError(f"the body is not {self._encoding}: {error}") from None
        if inflating.unused_data:
            raise UndecodableError(f"the body goes on behind its {self._encoding} data")
        if is_last and not inflating.eof and len(inflated) < most:
            raise UndecodableError(f"the body ends before its {self._encoding} data does")
        return inflated


def inflater_of(encoding: str) -> Inflater | None:
    """What inflates a body of this Content-Encoding; None where nothing here does."""
    name = encoding.strip().lower()
    return Inflater(name) if name in _WINDOW else None


def wanted_encoding(accept: str, size: int) -> str | None:
    """The encoding for an answer of that many bytes; None for none.

    Args:
        accept: The request's Accept-Encoding.
        size: Of the answer.
    """
    if size < _WORTH_IT:
        return None
    for each in accept.lower().split(","):
        name, _, weight = (part.strip() for part in each.partition(";"))
        if name in _WINDOW and weight.replace(" ", "").rstrip(".0") != "q=":
            return name
    return None


def compressed(body: bytes, encoding: str) -> bytes:
    """A body in that encoding."""
    deflating = zlib.compressobj(_FAST, wbits=_WINDOW[encoding])
    return deflating.compress(body) + deflating.flush()
