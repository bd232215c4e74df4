"""What surrounds every request: a name for it, and limits on its body that hold while the body arrives."""

from __future__ import annotations

import asyncio
import random
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ClientGoneError, QueueFullError, TooLargeError, TooSlowError

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

LARGEST_BODIES = 8
"""How many bodies of the largest size are held at once."""

LEAST_BYTES_PER_S = 1024
"""A body that comes more slowly than this, on average, is not waited for."""


class RequestId:
    """Gives every request an id, the client's own where it sent a plain one, and returns it as `x-request-id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        borne = Headers(scope=scope).get("x-request-id", "")
        request_id = borne if _REQUEST_ID.fullmatch(borne) else f"{random.getrandbits(128):032x}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, named)


class BodyLimit:
    """Guards the bodies of this process while they arrive: how long each is, how fast it comes, how much all hold.

    Args:
        app: What is guarded.
        max_bytes: Largest body. A longer one is refused, at once where it says so beforehand.
        client_timeout_s: Longest time without a byte. Drops of a few bytes do not extend it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, client_timeout_s: float) -> None:
        self._app, self._max_bytes, self._client_timeout_s = app, max_bytes, client_timeout_s
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "0")
        is_too_long = announced.isascii() and announced.isdigit() and int(announced[:20]) > self._max_bytes
        start, received, is_complete = asyncio.get_running_loop().time(), 0, False

        async def limited() -> Message:
            nonlocal received, is_complete
            if is_complete:
                return await receive()  # how a client that leaves is noticed: waits for as long as that takes
            message = await self._patiently(receive, start + received / LEAST_BYTES_PER_S)
            if message["type"] == "http.disconnect":
                raise ClientGoneError("the client hung up before its body was complete")
            is_complete = not message.get("more_body", False)
            size = len(message.get("body", b""))
            received += size
            self._held += size
            if is_too_long or received > self._max_bytes:
                limit = self._max_bytes
                raise TooLargeError(f"the body is larger than {limit} bytes", max_body_bytes=limit)
            if self._held > LARGEST_BODIES * self._max_bytes:
                raise QueueFullError(
                    f"requests hold {self._held} bytes; at most {LARGEST_BODIES * self._max_bytes} may be held at once",
                    retry_after_s=1,
                )
            return message

        try:
            await self._app(scope, limited, send)
        finally:
            self._held -= received

    async def _patiently(self, receive: Receive, due: float) -> Message:
        """The next piece of a body; `due` is when, on the loop's clock, what is there already had to be there."""
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(min(now, due) + self._client_timeout_s):
                return await receive()
        except TimeoutError:
            raise TooSlowError(
                f"the body stopped arriving for {self._client_timeout_s:g} s, or comes at less than "
                f"{LEAST_BYTES_PER_S} bytes/s"
            ) from None
