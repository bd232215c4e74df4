"""Ids, log line and span of a call that does not arrive by HTTP; `Front` does the same for HTTP requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.api.access_log import AccessLog
from server.errors import ClientGoneError, ServerError
from server.tracing.context import CURRENT, RequestContext, caller_of, request_id_of

if TYPE_CHECKING:
    from server.tracing.provider import Tracing


@dataclass
class Call:
    """A call that is being answered.

    Attributes:
        context: Its ids.
        error: The error of its answer, once it is known. Raised errors are recorded without this.
        r: The `r` that was used, once it is known.
    """

    context: RequestContext
    error: Exception | None = None
    r: str | None = None

    @property
    def status(self) -> int:
        """The status that HTTP would have."""
        if self.error is None:
            return 200
        return self.error.status if isinstance(self.error, ServerError) else 500


@dataclass(frozen=True)
class Calls:
    """Records calls.

    Attributes:
        access_log: Gets a line a call; None for no lines.
        tracing: Makes their spans; None for none.
    """

    access_log: AccessLog | None = None
    tracing: Tracing | None = None

    @contextmanager
    def note(
        self, system: str, name: str, headers: Mapping[str, str], client: str | None = None, *, is_probe: bool = False
    ) -> Iterator[Call]:
        """Records a call, from its head to its answer; a context manager.

        Args:
            system: Its protocol: "grpc".
            name: Its name, as `/SERVICE/METHOD`.
            headers: Its metadata, with names in lower case.
            client: The caller's address.
            is_probe: It only checks whether the server is up: no span, and a line only at level debug.
        """
        start, request_id = time.monotonic(), request_id_of(headers.get("x-request-id"))
        context = RequestContext(request_id, caller_of(headers.get("traceparent", ""), headers.get("tracestate")))
        if self.tracing is not None and not is_probe:
            service, _, method = name.strip("/").rpartition("/")
            asked = {"rpc.system": system, "rpc.service": service, "rpc.method": method, "tome.request_id": request_id}
            context.span = self.tracing.serve(name.strip("/"), context.caller, asked)
        token, call = CURRENT.set(context), Call(context)
        try:
            yield call
        except asyncio.CancelledError:
            call.error = call.error or ClientGoneError("the call was withdrawn")
            raise
        except Exception as error:
            call.error = call.error or error  # the raised error may only carry a known one to gRPC
            raise
        finally:
            CURRENT.reset(token)
            status = call.status
            if self.access_log is not None:
                took_s = time.monotonic() - start
                self.access_log.note(
                    system.upper(), name, status, took_s, context, r=call.r, client=client, is_probe=is_probe
                )
            if context.span is not None:
                if call.error is not None:
                    context.span.fail(call.error)
                context.span.end(is_our_fault=status >= 500)
