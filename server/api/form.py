"""Forms, multipart/form-data (RFC 7578): the parts of a body that is there as a whole.

The limit on bodies holds for what is kept here, so nothing is written to a disk, and a search for the boundary costs
less than a parser that sees one byte after the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

from server.errors import UndecodableError, shown

_LONGEST_HEAD = 16 << 10
_LONGEST_BOUNDARY = 200  # RFC 2046 has 70, and some clients longer ones
_PARAMETER = re.compile(r';\s*([^\s=;"]+)\s*=\s*("(?:\\.|[^"\\])*"|[^;]*)')
_ESCAPED = re.compile(r'\\(["\\])')
_WINDOWS_PATH = re.compile(r"^(?:[A-Za-z]:)?\\(?:.*\\)?")
_CHARSETS = ("utf-8", "iso-8859-1")
_AS_IT_IS = ("binary", "8bit", "7bit")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a form.

    Attributes:
        filename: What the client calls the file; None where it names none.
    """

    name: str
    filename: str | None
    content: bytes


def boundary_of(content_type: str) -> bytes:
    """What stands between the parts; raises UndecodableError where the header does not say."""
    boundary = _parameters(content_type).get("boundary", "")
    if not 1 <= len(boundary) <= _LONGEST_BOUNDARY:
        raise _unreadable(f"its boundary has {len(boundary)} characters, and must have 1 to {_LONGEST_BOUNDARY}")
    return boundary.encode("latin-1", "replace")


def parts_of(body: bytes, boundary: bytes) -> Iterator[Part]:
    """The parts of a form, one after the other.

    Raises:
        UndecodableError: The body is no form of that boundary.
    """
    mark = b"--" + boundary
    separator = b"\r\n" + mark
    at = 0 if body.startswith(mark) else body.find(separator) + 2  # what stands before is a preamble
    if at == 1:
        raise _unreadable("it does not hold its boundary; lines must end in CR LF")
    at += len(mark)
    while body[at : at + 2] != b"--":
        line_end = body.find(b"\r\n", at, at + _LONGEST_HEAD)
        if line_end < 0 or body[at:line_end].strip(b" \t"):
            raise _unreadable("a boundary is followed by other text; lines must end in CR LF")
        head_end = body.find(b"\r\n\r\n", line_end, line_end + _LONGEST_HEAD)
        if head_end < 0:
            raise _unreadable(f"the head of a part has no end within {_LONGEST_HEAD} bytes")
        end = body.find(separator, head_end + 4)
        if end < 0:
            raise _unreadable("it ends before its last boundary")
        name, filename = _described(body[line_end + 2 : head_end])
        yield Part(name, filename, body[head_end + 4 : end])
        at = end + len(separator)


def _described(head: bytes) -> tuple[str, str | None]:
    """Name and file name of a part, from its headers."""
    disposition = ""
    for line in _text(head).split("\r\n"):
        header, _, value = line.partition(":")
        kind = header.strip().lower()
        if kind == "content-disposition":
            disposition = value.strip()
        elif kind == "content-transfer-encoding" and value.strip().lower() not in _AS_IT_IS:
            raise _unreadable(
                f"Content-Transfer-Encoding is {shown(value.strip())}; send the bytes of a part as they are"
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
