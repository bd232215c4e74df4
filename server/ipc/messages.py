"""The messages between an HTTP process and an engine: every request, every answer, and both as bytes.

A new operation needs a new kind of `Request` and the kind of its results in this file. It also needs an endpoint and a
computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Struct

from server.curve import Curve
from server.dial import AutoR, RSetting, Schedule
from server.errors import ServerError
from server.images.image import Image
from server.types import Activation, Compiling, ComputedBy, Configuration, ModelInfo, ModelState

T = TypeVar("T")


class Request(Struct, Generic[T], frozen=True, array_like=True, kw_only=True):
    """Images for one model, which share one `r`. `T` is the type of an image's result.

    Attributes:
        model: Its name.
        images: At least one.
        r: The requested `r` of each block, or the bounds of `auto`; None takes the deployment's.
        deadline: When the answer becomes useless, in seconds of `time.monotonic()`, the same in all processes.
        trace: The caller's span as a W3C `traceparent`, followed by a space and its `tracestate` if it has one; None
            without a span.
        revision: The revision of the model that the images were prepared for; empty takes the one that serves now.
    """

    model: str
    images: list[Image]
    r: Schedule | AutoR | None = None
    deadline: float
    trace: str | None = None
    revision: str = ""

    @property
    def operation(self) -> str:
        """The computation. Images of one operation share batches, even if their requests want different outputs."""
        return "forward"


class TopK(Struct, frozen=True, array_like=True, gc=False, tag="top_k"):
    """The likeliest classes of one image, best first, with their probabilities."""

    indices: list[int]
    scores: list[float]


class Vector(Struct, frozen=True, array_like=True, gc=False, tag="vector"):
    """Numbers of one image: float32, little-endian."""

    values: bytes


class Merges(Struct, frozen=True, array_like=True, tag="merges"):
    """The likeliest classes of one image, and the groups of its merged patches.

    Attributes:
        top_k: The classes.
        grid: Rows and columns of patches.
        patch: Side of a patch in pixels of the model's input.
        groups: For each block and each patch, row by row: the first patch of its group after that block.
    """

    top_k: TopK
    grid: tuple[int, int]
    patch: int
    groups: list[list[int]]


class Classify(Request[TopK], frozen=True, tag="classify"):
    """Asks for the likeliest classes of each image.

    Attributes:
        top_k: The most classes in the answer.
        activation: Turns logits into scores.
        threshold: Least score of a class in the answer; None gives `top_k` classes of any score.
    """

    top_k: int
    activation: Activation = "softmax"
    threshold: float | None = None


class Score(Request[Vector], frozen=True, tag="score"):
    """Asks for the scores of all classes, in their order.

    Attributes:
        activation: Turns logits into scores; "none" gives the logits.
        features: Whether the pooled features follow the scores.
    """

    activation: Activation = "none"
    features: bool = False


class Embed(Request[Vector], frozen=True, tag="embed"):
    """Asks for the pooled features that the classifier reads."""


class Explain(Request[Merges], frozen=True, tag="explain"):
    """Asks for the likeliest classes of each image, and for the groups of merged patches after every block."""

    top_k: int
    activation: Activation = "softmax"

    @property
    def operation(self) -> str:
        return "explain"


class Item(Struct, frozen=True):
    """One image of a request. It waits in a queue, and shares a batch with images of other requests.

    Attributes:
        request: The request.
        index: Its place among the images of the request.
    """

    request: Classify | Score | Embed | Explain
    index: int

    @property
    def image(self) -> Image:
        return self.request.images[self.index]


Reason = Literal["idle", "load", "bounds", "shared"]


class Choice(Struct, frozen=True, array_like=True):
    """A schedule that `auto` chose.

    Attributes:
        schedule: `r` of each block.
        reason: "idle": the load needed no more than r=0. "load": the load needed this `r`. "bounds": the load needed a
            higher `r` than the request allows. "shared": the image filled up a batch of this schedule.
        expected_agreement: Share of images that keep the answer of r=0; None if it was not measured.
    """

    schedule: Schedule
    reason: Reason
    expected_agreement: float | None


class Answered(Struct, Generic[T], frozen=True, array_like=True, tag="answered"):
    """A request's results, one for each image in order, and how they were computed.

    Attributes:
        results: The results of the images.
        schedule: `r` of each block.
        config_version: The version of the configuration when the request came.
        batch_size: Images in the batch; of several batches the largest.
        queue_s: Seconds in the queue; of several images the longest.
        inference_s: Seconds from the end of the queue to the answer; of several images the longest.
        computed_by: The backend that computed it; if images differ, the one that replaced the model's own.
        auto: The choice of `auto`; None if the request or the deployment has another `r`.
    """

    results: list[T]
    schedule: Schedule
    config_version: int
    batch_size: int
    queue_s: float
    inference_s: float
    computed_by: ComputedBy
    auto: Choice | None = None


class Probe(Struct, frozen=True, array_like=True, tag="probe"):
    """Asks whether the batch loop and the device work. It skips the queues."""


class GetCurve(Struct, frozen=True, array_like=True, tag="get_curve"):
    """Asks for the curve of a model."""

    model: str


class GetCompiling(Struct, frozen=True, array_like=True, tag="get_compiling"):
    """Asks how far the compilation of a model's schedules is."""

    model: str


class GetConfiguration(Struct, frozen=True, array_like=True, tag="get_configuration"):
    """Asks for the deployment `r` of every model."""


class Configure(Struct, frozen=True, array_like=True, tag="configure"):
    """Changes the deployment `r` of some models: of all that are named, or of none."""

    changes: Mapping[str, RSetting]
    expected_version: int | None


class Load(Struct, frozen=True, array_like=True, tag="load"):
    """Loads a model while the others serve, in the named version or the newest one."""

    model: str
    version: str | None


class Unload(Struct, frozen=True, array_like=True, tag="unload"):
    """Takes a model out of service."""

    model: str


class GetRepository(Struct, frozen=True, array_like=True, tag="get_repository"):
    """Asks which models are loaded, and which can be loaded."""


class Seen(Struct, frozen=True, array_like=True, tag="seen"):
    """Confirms the last catalog: all later requests use it. It has no answer."""


class Withdraw(Struct, frozen=True, array_like=True, tag="withdraw"):
    """Cancels the call of the same id."""


class Failure(Struct, frozen=True, array_like=True, tag="failure"):
    """A `ServerError` as a message."""

    code: str
    message: str
    retry_after_s: float | None
    details: dict[str, Any]

    @staticmethod
    def of(error: ServerError) -> Failure:
        """The message of an error."""
        return Failure(error.code, error.message, error.retry_after_s, error.details)

    def error(self) -> ServerError:
        """The error of this message."""
        return ServerError.of(self.code, self.message, self.retry_after_s, self.details)


class Alive(Struct, frozen=True, array_like=True, tag="alive"):
    """Answers a probe: the batch loop and the device work."""


class Measured(Struct, frozen=True, array_like=True, tag="measured"):
    """A model's curve, at the speeds of this moment."""

    curve: Curve


class Progress(Struct, frozen=True, array_like=True, tag="progress"):
    """How far the compilation of a model is; None if nothing is compiled."""

    compiling: Compiling | None


class Deployed(Struct, frozen=True, array_like=True, tag="deployed"):
    """The current configuration."""

    configuration: Configuration


class Done(Struct, frozen=True, array_like=True, tag="done"):
    """A model is loaded, or unloaded."""


class Repository(Struct, frozen=True, array_like=True, tag="repository"):
    """The models that are loaded, and those that can be loaded."""

    models: list[ModelState]


class Catalog(Struct, frozen=True, array_like=True, tag="catalog"):
    """The loaded models, the default first. The engine sends it first, and again after each change."""

    models: list[ModelInfo]


class Call(Struct, frozen=True, array_like=True):
    """A request of an HTTP process, with an id that the process chose."""

    id: int
    ask: (
        Classify
        | Score
        | Embed
        | Explain
        | Probe
        | GetCurve
        | GetCompiling
        | GetConfiguration
        | Configure
        | Load
        | Unload
        | GetRepository
        | Seen
        | Withdraw
    )


class Reply(Struct, frozen=True, array_like=True):
    """The engine's answer to the call of that id. A catalog answers no call."""

    id: int
    answer: (
        Answered[TopK | Vector | Merges]
        | Alive
        | Measured
        | Progress
        | Deployed
        | Done
        | Repository
        | Failure
        | Catalog
    )


def to_bytes(message: Call | Reply, into: bytearray) -> None:
    """Appends a message to a buffer."""
    _encoder.encode_into(message, into, len(into))


def call_of(message: memoryview) -> Call:
    """Reads a message of `to_bytes`. Raises msgspec.MsgspecError for other bytes."""
    return _calls.decode(message)


def reply_of(message: memoryview) -> Reply:
    """Reads a message of `to_bytes`. Raises msgspec.MsgspecError for other bytes."""
    return _replies.decode(message)


def _plain(value: object) -> Any:
    if isinstance(value, Curve):
        return value.model_dump()
    raise TypeError(f"a message cannot hold a {type(value).__name__}")


def _curve(kind: type[Curve], said: Any) -> Curve:
    return kind.model_validate(said)


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_calls, _replies = msgspec.msgpack.Decoder(Call), msgspec.msgpack.Decoder(Reply, dec_hook=_curve)
