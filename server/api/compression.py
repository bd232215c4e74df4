"""Compressed bodies, gzip and deflate (RFC 9110, 8.4.1): inflated within a limit, and produced if a client asks."""

from __future__ import annotations

import zlib

from server.errors import UndecodableError

_WINDOW = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""zlib's window bits for them."""

_FAST = 1
_WORTH_IT = 1 << 10
"""Least bytes of an answer that is compressed: a shorter one takes one packet in any case."""


class Inflater:
    """Inflates one body, piece by piece.

    Args:
        encoding: "gzip" or "deflate".
    """

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._inflating = zlib.decompressobj(_WINDOW[encoding])

    def feed(self, piece: bytes, most: int, is_last: bool) -> bytes:
        """Inflates a piece of the body.

        Args:
            piece: The bytes as they arrived.
            most: Most bytes of the result, at least 1. The result is cut there, so that a small body cannot fill the
                memory.
            is_last: Whether this is the last piece.

        Raises:
            UndecodableError: The body is not compressed so, or does not end where its data does.
        """
        inflating = self._inflating
        try:
            inflated = inflating.decompress(piece, most)
        except zlib.error as error:
            raise UndecodableError(f"the body is not {self._encoding}: {error}") from None
        if inflating.unused_data:
            raise UndecodableError(f"the body continues after its {self._encoding} data")
        if is_last and not inflating.eof and len(inflated) < most:
            raise UndecodableError(f"the body ends before its {self._encoding} data does")
        return inflated


def inflater_of(encoding: str) -> Inflater | None:
    """The inflater for a Content-Encoding; None if it is unsupported."""
    name = encoding.strip().lower()
    return Inflater(name) if name in _WINDOW else None


def wanted_encoding(accept: str, size: int) -> str | None:
    """The encoding for an answer; None for none.

    Args:
        accept: The request's Accept-Encoding.
        size: Bytes of the answer.
    """
    if size < _WORTH_IT:
        return None
    for each in accept.lower().split(","):
        name, _, weight = (part.strip() for part in each.partition(";"))
        if name in _WINDOW and weight.replace(" ", "").rstrip(".0") != "q=":
            return name
    return None


def compressed(body: bytes, encoding: str) -> bytes:
    """Compresses a body."""
    deflating = zlib.compressobj(_FAST, wbits=_WINDOW[encoding])
    return deflating.compress(body) + deflating.flush()
