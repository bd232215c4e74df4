"""The formats of the log: text, or JSON lines that name their request."""

from __future__ import annotations

import logging
import time
from typing import Any, Literal

import msgspec

from server.tracing.context import CURRENT

Format = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)s %(processName)s: %(message)s"


def time_of(seconds: float) -> str:
    """A wall-clock time as JSON lines have it: UTC, in milliseconds."""
    whole = int(seconds)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int(1e3 * (seconds - whole)):03d}Z"


def arrange(handler: logging.Handler, form: Format) -> None:
    """Sets the format of a handler."""
    if form == "json":
        handler.addFilter(_named)
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter(_TEXT))


def _named(record: logging.LogRecord) -> bool:
    """Adds the present request to a record. The count of repeated lines belongs to no request."""
    context = CURRENT.get()
    if context is not None:
        record.request_id, record.trace_id = context.request_id, context.trace_id
    return True


class _JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object; a traceback is one of its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time_of(record.created),
            "level": record.levelname.lower(),
            "process": record.processName,
            "logger": record.name,
            "message": _printable(record.getMessage()),
        }
        for name in ("request_id", "trace_id"):
            if (value := getattr(record, name, None)) is not None:
                line[name] = value
        if record.exc_info:
            line["exception"] = _printable(self.formatException(record.exc_info))
        return msgspec.json.encode(line).decode()


def _printable(text: str) -> str:
    """Text that JSON can hold: bytes of a path that are not UTF-8 become escapes, as in text lines."""
    return text.encode("utf-8", "backslashreplace").decode()
