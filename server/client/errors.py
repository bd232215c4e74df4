"""Errors of the connection. An error answer of the server is raised as its class in `server.errors`.

NoAnswerError             no answer of a ToMe Server came
├── UnreachableError      nothing was sent: refused, no such host
├── CutOffError           the connection broke: the server may have done it or not
├── LateError             no answer within `timeout_s`: likewise
└── ForeignError          the answer is not a ToMe Server's
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from server.client.retries import retry_after_s
from server.errors import ServerError, UnavailableError, shown

_BY_STATUS = {kind.status: kind for kind in ServerError.__subclasses__()} | {500: ServerError, 502: UnavailableError}
"""Meaning of a proxy's status: its 500 does not concern the engine, its 502 means that no server is there."""


class NoAnswerError(ConnectionError):
    """No answer of a ToMe Server came."""


class UnreachableError(NoAnswerError):
    pass


class CutOffError(NoAnswerError):
    pass


class LateError(NoAnswerError):
    pass


class ForeignError(NoAnswerError):
    pass


@contextmanager
def no_answer(url: str) -> Iterator[None]:
    """Turns httpx's errors into ours."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError) as error:
        raise UnreachableError(f"no connection to {url}: {_why(error)}") from error
    except httpx.TimeoutException as error:
        raise LateError(f"no answer from {url} within the timeout: {_why(error)}") from error
    except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
        raise CutOffError(f"the connection to {url} broke before the answer: {_why(error)}") from error


def error_of(response: httpx.Response) -> ServerError:
    """The error of an answer without success."""
    asked_s = retry_after_s(response.headers.get("retry-after"), time.time())  # noqa: TID251 - a date in the header
    try:
        told = response.json()["error"]
        error = ServerError.of(told["code"], told["message"], asked_s, told["details"])
    except (ValueError, KeyError, TypeError):
        kind = _BY_STATUS.get(response.status_code, ServerError)
        answered = f"{response.url} answered {response.status_code} {response.reason_phrase}"
        error = kind(
            f"{answered}, which is not an answer of a ToMe Server: {shown(response.text)}", retry_after_s=asked_s
        )
    if request_id := response.headers.get("x-request-id"):
        error.add_note(f"x-request-id: {request_id}")  # the server's log has the same id
    return error


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
