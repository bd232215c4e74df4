"""A request of any protocol: its body is read in time, admitted, decoded, answered and counted."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from fastapi import Request

from server import metrics
from server.api.access import Service
from server.api.patience import at_most, unless_client_leaves
from server.api.reading import Sent, read_and_ask
from server.api.schemas import Parameters
from server.api.terms import Terms, resolve, timings_of
from server.dial import Schedule, label_of, r_of, text_of
from server.errors import InvalidError, ServerError, shown
from server.images.image import Image
from server.ipc.messages import Answered, Classify, Embed, Explain, Merges, Score, TopK, Vector
from server.ipc.messages import Request as EngineRequest
from server.tracing.context import current_span, current_trace

T = TypeVar("T")

R_HEADER = "x-r"
"""Carries `r` both ways: in requests of protocols without a place for it, and in every answer."""


class Kind(NamedTuple, Generic[T]):
    """A kind of request.

    Attributes:
        make: Builds the engine's request from the terms and the decoded images.
        needs_classes: Whether the model must have a classifier.
    """

    make: Callable[[Terms, list[Image]], EngineRequest[T]]
    needs_classes: bool = True


def _common(terms: Terms, images: list[Image]) -> dict[str, Any]:
    return {
        "model": terms.info.name,
        "images": images,
        "r": terms.r,
        "deadline": terms.deadline,
        "trace": current_trace(),
        "revision": terms.info.revision,
    }


def _classify(terms: Terms, images: list[Image]) -> Classify:
    common = _common(terms, images)
    return Classify(**common, top_k=terms.top_k, activation=terms.activation, threshold=terms.threshold)


def _score(terms: Terms, images: list[Image]) -> Score:
    return Score(**_common(terms, images), activation=terms.activation)


def _score_and_embed(terms: Terms, images: list[Image]) -> Score:
    return Score(**_common(terms, images), activation=terms.activation, features=True)


def _embed(terms: Terms, images: list[Image]) -> Embed:
    return Embed(**_common(terms, images))


def _explain(terms: Terms, images: list[Image]) -> Explain:
    if terms.threshold is not None:
        raise InvalidError("threshold does not apply here; an explanation names the top_k likeliest classes")
    return Explain(**_common(terms, images), top_k=terms.top_k, activation=terms.activation)


CLASSIFY: Kind[TopK] = Kind(_classify)
SCORE: Kind[Vector] = Kind(_score)
SCORE_AND_EMBED: Kind[Vector] = Kind(_score_and_embed)
EMBED: Kind[Vector] = Kind(_embed, needs_classes=False)
EXPLAIN: Kind[Merges] = Kind(_explain, needs_classes=False)


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """An answered request.

    Attributes:
        terms: The request's terms.
        answered: The engine's answer.
        timings_ms: Time of each stage: a `TimingsMs`.
    """

    terms: Terms
    answered: Answered[T]
    timings_ms: dict[str, float]

    @property
    def headers(self) -> dict[str, str]:
        """The headers that describe the computation."""
        answered = self.answered
        return {
            R_HEADER: text_of(r_of(answered.schedule)),
            "x-batch-size": str(answered.batch_size),
            "x-config-version": str(answered.config_version),
            "server-timing": ", ".join(f"{stage};dur={ms:.2f}" for stage, ms in self.timings_ms.items()),
        }


class Asking:
    """A request from its arrival to its answer. As a context it counts the request, also when it fails.

    Args:
        service: Answers it.
        request: The HTTP request, whose client may leave; None if another server than ours watches the client.
        r: The values of the header `x-r`, if there is no HTTP request.
    """

    __slots__ = ("_model", "_r", "_request", "_schedule", "_service", "_span", "start")

    def __init__(self, service: Service, request: Request | None = None, r: Sequence[str] = ()) -> None:
        self.start = time.monotonic()
        self._service, self._request = service, request
        self._span = current_span()
        self._r = r if request is None else request.headers.getlist(R_HEADER)
        self._model = "unknown"
        self._schedule: Schedule | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            # the request did not name the deployment's `r`
            r = "unknown" if self._schedule is None else label_of(self._schedule)
            status = error.status if isinstance(error, ServerError) else 500
            metrics.REQUESTS.labels(self._model, r, str(status)).inc()
            if self._span is not None:
                self._span.fail(error)

    async def read(self, body: Awaitable[T]) -> T:
        """Reads the body within the longest time that a request may take; raises DeadlineError."""
        async with at_most(self._service.settings.deadline_s, since=self.start):
            return await body

    def resolve(self, parameters: Parameters) -> Terms:
        """Checks the parameters against the model. Raises the errors of `terms.resolve`."""
        if self._span is not None:
            self._span.stage("reading", self.start)
        if self._r:
            r, *more = self._r
            if more:
                raise InvalidError(f"r is {shown(r)} and {shown(more[0])} in two headers {R_HEADER}; give it once")
            if parameters.r is not None:
                raise InvalidError(
                    f"r is {shown(parameters.r)} in the request and {shown(r)} in the header {R_HEADER}; give it once"
                )
            parameters = parameters.model_copy(update={"r": r})
        service = self._service
        terms = resolve(parameters, service.engine.catalog(), self.start, service.settings.deadline_s)
        self._model, self._schedule = terms.info.name, terms.schedule
        return terms

    async def answer(self, kind: Kind[T], sent: Sequence[Sent], terms: Terms) -> Answer[T]:
        """Answers a request.

        Args:
            kind: The kind of request.
            sent: Images as the client sent them; at least one.
            terms: The result of `resolve`.

        Raises:
            InvalidError: The model has no classifier.
            ServerError: Errors of admission and `read_and_ask`, or the client has left.
        """
        if kind.needs_classes and not terms.info.labels:
            raise InvalidError(f"model {terms.info.name} has no classifier; it gives vectors: POST /v1/embeddings")
        service = self._service
        with service.admission.permit(len(sent), terms.left_s):
            work = read_and_ask(kind.make, sent, terms, service)
            decode_s, answered = await (work if self._request is None else unless_client_leaves(self._request, work))
        timings = timings_of(answered, decode_s, self.start)
        requests, images, seconds = _counters(terms.info.name, label_of(answered.schedule))
        requests.inc()
        images.inc(len(sent))
        seconds.observe(timings["total"] / 1e3)
        if self._span is not None:
            self._span.tell(_facts(terms, answered, len(sent)))
        return Answer(terms, answered, timings)


def _facts(terms: Terms, answered: Answered[Any], num_images: int) -> dict[str, str | int]:
    """The attributes of an answered request's span."""
    return {
        "tome.model": terms.info.name,
        "tome.r": text_of(r_of(answered.schedule)),
        "tome.tokens": terms.info.token_counts(answered.schedule)[-1],
        "tome.batch_size": answered.batch_size,
        "tome.images": num_images,
    }


@functools.lru_cache(1024)
def _counters(model: str, r: str) -> tuple[Any, Any, Any]:
    """The counters of a model's answers at one `r`. A look-up of labels takes as long as the counting."""
    return metrics.REQUESTS.labels(model, r, "200"), metrics.IMAGES.labels(model, r), metrics.REQUEST_S.labels(model, r)
