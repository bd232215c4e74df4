"""The spans of an engine: the wait and the answer of each request, and one span a batch with links to its requests."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.trace import Link, Tracer, get_current_span

from server.dial import r_of, text_of
from server.tracing.server_span import fail
from server.tracing.written import context_of, wall_ns
from server.types import BatchKey, ModelInfo


class EngineSpans:
    """Records the requests and batches of a `LocalEngine`.

    Args:
        tracer: Makes the spans. A request that its client or the sampler does not record has none here either.
        models: The served models.
    """

    def __init__(self, tracer: Tracer, models: Mapping[str, ModelInfo]) -> None:
        self._tracer, self._models = tracer, models

    def asked(self, request: Any, answering: asyncio.Future[Any]) -> None:
        """Notes a request that was taken; its spans are made when it is answered."""
        if _is_recorded(request.trace):
            answering.add_done_callback(functools.partial(self._answered, request, time.monotonic()))

    def _answered(self, request: Any, came: float, answering: asyncio.Future[Any]) -> None:
        # After the answer has left: the reply is written in this turn of the loop.
        asyncio.get_running_loop().call_soon(self._note, request, came, time.monotonic(), answering)

    def _note(self, request: Any, came: float, left: float, answering: asyncio.Future[Any]) -> None:
        parent = context_of(request.trace)
        what = {"tome.model": request.model, "tome.images": len(request.images), "tome.operation": request.operation}
        queue = self._tracer.start_span("queue", parent, attributes=what, start_time=wall_ns(came))
        error = None if answering.cancelled() else answering.exception()
        if error is not None or answering.cancelled():
            fail(queue, error or asyncio.CancelledError("the request was withdrawn"))
            queue.end(wall_ns(left))
            return
        answered = answering.result()
        taken = wall_ns(came + answered.queue_s)
        queue.end(taken)
        what |= self._of(request.model, answered.schedule) | {"tome.batch_size": answered.batch_size}
        answer = self._tracer.start_span("answer", parent, attributes=what, start_time=taken)
        answer.end(wall_ns(left))

    def batch_ran(self, key: BatchKey, items: Sequence[Any], outcomes: Sequence[Any], started: float) -> None:
        """Records a batch.

        Args:
            key: The key of its images.
            items: Its images, each with its request.
            outcomes: The result or error of each.
            started: When it was taken, in seconds of `time.monotonic()`.
        """
        traces = dict.fromkeys(item.request.trace for item in items if _is_recorded(item.request.trace))
        if not traces:
            return
        links = [Link(get_current_span(context_of(trace)).get_span_context()) for trace in traces]
        what = self._of(key.model, key.schedule)
        what |= {"tome.model": key.model, "tome.operation": key.operation, "tome.batch_size": len(items)}
        span = self._tracer.start_span(
            "batch", context_of(None), attributes=what, links=links, start_time=wall_ns(started)
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if errors:
            fail(span, errors[0])
        span.end(time.time_ns())

    def _of(self, model: str, schedule: Any) -> dict[str, Any]:
        info = self._models.get(model)
        what: dict[str, Any] = {"tome.r": text_of(r_of(schedule))}
        if info is not None:
            what["tome.tokens"] = info.token_counts(schedule)[-1]
        return what


def _is_recorded(trace: str | None) -> bool:
    return trace is not None and int(trace[53:55], 16) & 1 == 1
