"""Forms, multipart/form-data (RFC 7578): python-multipart finds the parts, and this module interprets them.

Starlette's own reader writes large files to disk, which may be full, and does not accept a large part without a file
name as an image. The limit on bodies bounds the memory here, so no disk is needed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

from server.errors import UndecodableError, shown

_MOST_HEADERS, _LONGEST_HEADER = 16, 16 << 10
_LONGEST_BOUNDARY = 200  # RFC 2046 allows 70, and some clients send more
_PARAMETER = re.compile(r';\s*([^\s=;"]+)\s*=\s*("(?:\\.|[^"\\])*"|[^;]*)')
_ESCAPED = re.compile(r'\\(["\\])')
_WINDOWS_PATH = re.compile(r"^(?:[A-Za-z]:)?\\(?:.*\\)?")
_CHARSETS = ("utf-8", "iso-8859-1")
_AS_IT_IS = (b"binary", b"8bit", b"7bit")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a form.

    Attributes:
        filename: The client's name of the file; None if it names none.
    """

    name: str
    filename: str | None
    content: bytes


def boundary_of(content_type: str) -> bytes:
    """The boundary between the parts; raises UndecodableError if the header has none."""
    boundary = _parameters(content_type).get("boundary", "")
    if not 1 <= len(boundary) <= _LONGEST_BOUNDARY:
        raise _unreadable(f"its boundary has {len(boundary)} characters; it must have 1 to {_LONGEST_BOUNDARY}")
    return boundary.encode("latin-1", "replace")


class FormReader:
    """Reads the parts of a form while its body arrives.

    Args:
        boundary: The boundary between the parts.
        most: Most parts.

    Attributes:
        parts: The complete parts so far.
    """

    def __init__(self, boundary: bytes, most: int) -> None:
        self._collector = _Collector(most)
        self.parts = self._collector.parts
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._collector.begin,
                "on_header_field": self._collector.add_to_header,
                "on_header_value": self._collector.add_to_value,
                "on_header_end": self._collector.end_header,
                "on_part_data": self._collector.add_to_content,
                "on_part_end": self._collector.end,
                "on_end": self._collector.finish,
            },
            max_header_count=_MOST_HEADERS,
            max_header_size=_LONGEST_HEADER,
        )

    def feed(self, piece: bytes) -> None:
        """Parses a piece. Raises UndecodableError if the body is not a form with this boundary, or has too many
        parts.
        """
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise _unreadable(str(error)) from None

    def close(self) -> None:
        """Ends the parsing; raises UndecodableError if the last boundary is missing."""
        if not self._collector.is_whole:
            raise _unreadable("it ends before its last boundary")


class _Collector:
    """Assembles the parts from the parser's events.

    The parser keeps these methods. So they belong to an object that does not refer to the parser: a reference cycle
    would keep every body in memory until the garbage collector runs, which is rare.
    """

    def __init__(self, most: int) -> None:
        self.parts: list[Part] = []
        self.is_whole = False
        self._most = most
        self._header, self._value = bytearray(), bytearray()
        self._headers: list[tuple[bytes, bytes]] = []
        self._content: list[bytes] = []

    def begin(self) -> None:
        if len(self.parts) == self._most:
            raise _unreadable(f"it has more than {self._most} parts")
        self._headers = []

    def add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def end_header(self) -> None:
        self._headers.append((bytes(self._header).lower(), bytes(self._value)))
        self._header.clear()
        self._value.clear()

    def add_to_content(self, data: bytes, start: int, end: int) -> None:
        self._content.append(data[start:end])

    def end(self) -> None:
        name, filename = _described(self._headers)
        content, self._content = b"".join(self._content), []
        self.parts.append(Part(name, filename, content))

    def finish(self) -> None:
        self.is_whole = True


def _described(headers: Sequence[tuple[bytes, bytes]]) -> tuple[str, str | None]:
    """Name and file name of a part, from its headers."""
    disposition = ""
    for header, value in headers:
        if header == b"content-disposition":
            disposition = _text(value).strip()
        elif header == b"content-transfer-encoding" and value.strip().lower() not in _AS_IT_IS:
            raise _unreadable(
                f"Content-Transfer-Encoding is {shown(_text(value).strip())}; send the bytes of a part unencoded"
            )
    said = _parameters(disposition)
    if not disposition.lower().startswith("form-data") or "name" not in said:
        raise _unreadable('a part has no header like Content-Disposition: form-data; name="image"')
    filename = said.get("filename")
    if "filename*" in said:  # RFC 5987: charset'language'percent-encoded
        charset, _, encoded = said["filename*"].partition("'")
        if charset.lower() not in _CHARSETS:
            raise _unreadable(f"filename* is in {shown(charset)}; it may be in UTF-8 or ISO-8859-1")
        filename = unquote(encoded.partition("'")[2], charset, "replace")
    return said["name"], filename and _WINDOWS_PATH.sub("", filename)


def _parameters(header: str) -> dict[str, str]:
    """The parameters of a header's value, as in `form-data; name="image"; filename="a;b.jpg"`."""
    said: dict[str, str] = {}
    for name, value in _PARAMETER.findall(header):
        plain = _ESCAPED.sub(r"\1", value[1:-1]) if value[:1] == '"' == value[-1:] else value.strip()
        said.setdefault(name.lower(), plain)
    return said


def _text(encoded: bytes) -> str:
    try:
        return encoded.decode()
    except UnicodeDecodeError:
        return encoded.decode("latin-1")


def _unreadable(why: str) -> UndecodableError:
    return UndecodableError(f"the form cannot be read: {why}")
