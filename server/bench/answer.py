"""An HTTP answer, parsed from its bytes: status and length; headers only on demand."""

from __future__ import annotations

from collections.abc import Mapping

LONGEST_HEAD = 1 << 16
_NEVER = 1 << 62


class HttpAnswer:
    """An HTTP answer.

    Attributes:
        status: HTTP status.
        head: Everything before the body, unparsed.
        body: The body.
    """

    __slots__ = ("status", "head", "body")

    def __init__(self, status: int, head: bytes, body: bytes) -> None:
        self.status, self.head, self.body = status, head, body

    @property
    def headers(self) -> Mapping[str, str]:
        """All headers, with names in lower case; parsed at each call."""
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}

    def header(self, name: bytes) -> str:
        """One header, by its name in lower case; "" if it is missing."""
        return _header(self.head, self.head.lower(), name) or ""


def read(come: bytes, ended: bool = False) -> tuple[HttpAnswer, bool] | int:
    """Parses an answer, if it is complete.

    Args:
        come: The bytes so far.
        ended: No more bytes will come.

    Returns:
        The answer, and whether the connection can be kept; or the number of bytes from which to look again.

    Raises:
        ValueError: This is not HTTP.
    """
    start, end, status = 0, 0, 100
    while status < 200:  # 1xx precede another answer
        start, end = end, come.find(b"\r\n\r\n", end) + 4
        if (len(come) if end < 4 else end) - start > LONGEST_HEAD:
            raise ValueError("the head is too long")
        if end < 4:
            return len(come) + 1
        if come[start : start + 5] != b"HTTP/":
            raise ValueError(come[start : start + 20])
        status = int(come[start + 9 : start + 12])
    head = come[start:end]
    small = head.lower()
    keeps = small.startswith(b"http/1.1 ") and _header(head, small, b"connection") != "close"
    if status in (204, 304):
        return HttpAnswer(status, head, b""), keeps and len(come) == end
    if _header(head, small, b"transfer-encoding") == "chunked":
        body = _chunks(come, end)
        return len(come) + 1 if body is None else (HttpAnswer(status, head, body), keeps)
    said = _header(head, small, b"content-length")
    if said is None:
        return (HttpAnswer(status, head, come[end:]), False) if ended else _NEVER
    whole = end + int(said)
    return whole if len(come) < whole else (HttpAnswer(status, head, come[end:whole]), keeps and len(come) == whole)


def _header(head: bytes, small: bytes, name: bytes) -> str | None:
    """A header of a head, which is also given in lower case; None if it is missing."""
    start = small.find(b"\r\n%b:" % name)
    if start < 0:
        return None
    start += len(name) + 3
    return head[start : head.index(b"\r\n", start)].strip().decode("latin-1")


def _chunks(come: bytes, at: int) -> bytes | None:
    """A body in chunks; None if it is incomplete."""
    chunks: list[bytes] = []
    while (end := come.find(b"\r\n", at)) >= 0:
        size = int(come[at:end].partition(b";")[0], 16)
        at = end + 2
        if not size:
            break
        chunks.append(come[at : at + size])
        at += size + 2
    while (end := come.find(b"\r\n", at)) > at:
        at = end + 2  # trailers
    return b"".join(chunks) if end == at else None
