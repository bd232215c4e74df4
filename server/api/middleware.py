"""What surrounds every request: a name for it, and a cap on its body that holds while the body arrives."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ClientGoneError, TooLargeError

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestId:
    """Gives every request an id, the client's own where it sent a plain one, and returns it as `x-request-id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        borne = Headers(scope=scope).get("x-request-id", "")
        request_id = borne if _REQUEST_ID.fullmatch(borne) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, named)


class BodyLimit:
    """Refuses a body that announces more than `max_bytes`, ends a longer one, and tells when one is cut off."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "0")
        is_too_long = announced.isascii() and announced.isdigit() and int(announced[:20]) > self._max_bytes
        received, is_complete = 0, False

        async def limited() -> Message:
            nonlocal received, is_complete
            message = await receive()
            if message["type"] == "http.disconnect" and not is_complete:
                raise ClientGoneError("the client hung up before its body was complete")
            is_complete = is_complete or not message.get("more_body", False)
            received += len(message.get("body", b""))
            if is_too_long or received > self._max_bytes:
                limit = self._max_bytes
                raise TooLargeError(f"the body is larger than {limit} bytes", max_body_bytes=limit)
            return message

        await self._app(scope, limited, send)
