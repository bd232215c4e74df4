"""The errors of requests, in one table of codes and statuses, and the error of a setting.

ServerError
├── UndecodableError      400  the body or an image in it cannot be read
├── UnauthorizedError     401  no valid key
├── ForbiddenError        403  the admin key is needed
├── NotFoundError         404  no such model
├── TooSlowError          408  the body stopped arriving, or arrives too slowly
├── ConflictError         409  the configuration changed meanwhile
├── TooLargeError         413  too many bytes, pixels or images
├── UnsupportedError      415  not an allowed format
├── InvalidError          422  a parameter is out of range
├── ClientGoneError       499  the client hung up; only metrics show it
├── EngineError           500  the model failed on this batch
├── QueueFullError        429  retry after `retry_after_s`
├── UnavailableError      503  not ready, draining, or the engine is down
└── DeadlineError         504  the deadline passed before the answer
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar

_quote = reprlib.Repr()
_quote.maxstring = _quote.maxother = 80
_quote.maxlevel = 3
_LONGEST = 200


def shown(value: object) -> str:
    """A client's value as a message may quote it: printable and short."""
    try:
        text = _quote.repr(value)
    except ValueError:  # an integer with more digits than Python writes, for example a long hexadecimal number of YAML
        return "a number that is too long to be shown"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class ServerError(Exception):
    """A request whose answer is an error.

    Args:
        message: The error, with the value (through `shown`) and the allowed range. Clients see it.
        retry_after_s: Seconds after which a retry makes sense.
        details: Machine-readable facts for the client. Never the client's own data, which may not be valid JSON.
    """

    code: ClassVar[str] = "server_error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, retry_after_s: float | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.details = details

    @staticmethod
    def of(code: str, message: str, retry_after_s: float | None, details: Mapping[str, Any]) -> ServerError:
        """Makes the error of a code that another process sent."""
        kind = next((kind for kind in ServerError.__subclasses__() if kind.code == code), ServerError)
        return kind(message, retry_after_s=retry_after_s, **details)


class UndecodableError(ServerError):
    code, status = "undecodable", 400


class UnauthorizedError(ServerError):
    code, status = "unauthorized", 401


class ForbiddenError(ServerError):
    code, status = "forbidden", 403


class NotFoundError(ServerError):
    code, status = "not_found", 404


class TooSlowError(ServerError):
    code, status = "too_slow", 408


class ConflictError(ServerError):
    code, status = "conflict", 409


class TooLargeError(ServerError):
    code, status = "too_large", 413


class UnsupportedError(ServerError):
    code, status = "unsupported_format", 415


class InvalidError(ServerError):
    code, status = "invalid_parameter", 422


class QueueFullError(ServerError):
    code, status = "queue_full", 429


class ClientGoneError(ServerError):
    code, status = "client_gone", 499


class EngineError(ServerError):
    code, status = "engine_error", 500


class UnavailableError(ServerError):
    code, status = "unavailable", 503


class DeadlineError(ServerError):
    code, status = "deadline_exceeded", 504


class SettingsError(ValueError):
    """A setting is unknown or wrong. The message names it, and the service does not start."""
