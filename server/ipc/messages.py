"""What crosses between an HTTP process and an engine: every request, every answer, and both as bytes.

A new operation is a new kind of `Request`, with the kind of its results, in this file; beside it stand its endpoint and
its computation.
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
    """Images for one model, which share one `r`. `T` is what each image is answered with.

    Attributes:
        model: Its name.
        images: At least one.
        r: `r` of each block as asked, or the bounds of `auto`; None takes the deployment's.
        deadline: When the answer is worth nothing, in seconds of `time.monotonic()`, which all processes share.
        trace: The caller's span as a W3C `traceparent`, and after a blank its `tracestate` where it has one; None
            where it has no span.
        revision: That of the model that the images were prepared for; empty takes the one that serves now.
    """

    model: str
    images: list[Image]
    r: Schedule | AutoR | None = None
    deadline: float
    trace: str | None = None
    revision: str = ""

    @property
    def operation(self) -> str:
        """What is to be computed. Images of one operation share batches, whatever is wanted of its outcome."""
        return "forward"


class TopK(Struct, frozen=True, array_like=True, gc=False, tag="top_k"):
    """The likeliest classes of one image, best first, with their probabilities."""

    indices: list[int]
    scores: list[float]


class Vector(Struct, frozen=True, array_like=True, gc=False, tag="vector"):
    """Numbers of one image: float32, little-endian."""

    values: bytes


class Merges(Struct, frozen=True, array_like=True, tag="merges"):
    """The likeliest classes of one image, and which of its patches merged.

    Attributes:
        top_k: The classes.
        grid: Rows and columns of patches.
        patch: Side of a patch in pixels of the model's input.
        groups: For each block, for each patch row by row, the first patch of the group that it is in after that block.
    """

    top_k: TopK
    grid: tuple[int, int]
    patch: int
    groups: list[list[int]]


class Classify(Request[TopK], frozen=True, tag="classify"):
    """Asks for the likeliest classes of each image.

    Attributes:
        top_k: How many, at most.
        activation: What makes scores of logits.
        threshold: Least score of a class that is named; None names `top_k` whatever their scores.
    """

    top_k: int
    activation: Activation = "softmax"
    threshold: float | None = None


class Score(Request[Vector], frozen=True, tag="score"):
    """Asks for the scores of all classes, in their order.

    Attributes:
        activation: What makes scores of logits; "none" gives the logits.
        features: Whether the pooled features follow the scores.
    """

    activation: Activation = "none"
    features: bool = False


class Embed(Request[Vector], frozen=True, tag="embed"):
    """Asks for the pooled features that the classifier reads."""


class Explain(Request[Merges], frozen=True, tag="explain"):
    """Asks for the likeliest classes of each image, and for what merged in every block."""

    top_k: int
    activation: Activation = "softmax"

    @property
    def operation(self) -> str:
        return "explain"


class Item(Struct, frozen=True):
    """One image of a request: what waits in a queue, and shares a batch with those of other requests.

    Attributes:
        request: What is asked of it.
        index: Its place among the images.
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
        reason: "idle": nothing asked for more than r=0. "load": what waited and came. "bounds": the load asked for more
            than the request allows. "shared": it filled up a batch that merges otherwise.
        expected_agreement: Share of images that keep the answer of r=0, or None where nobody measured it.
    """

    schedule: Schedule
    reason: Reason
    expected_agreement: float | None


class Answered(Struct, Generic[T], frozen=True, array_like=True, tag="answered"):
    """A request's results, one for each image in order, and how they were computed.

    Attributes:
        results: Of the images.
        schedule: `r` of each block.
        config_version: The configuration that held when the request came.
        batch_size: Images in the batch; of several batches the largest.
        queue_s: Seconds in the queue; of several images the longest.
        inference_s: Seconds from there to the answer; of several images the longest.
        computed_by: The backend that computed it; where images differ, the one that stands in for the model's own.
        auto: What `auto` chose, where it was to choose.
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
    """Asks whether the batch loop and the device work. It waits in no queue."""


class GetCurve(Struct, frozen=True, array_like=True, tag="get_curve"):
    """Asks for what was measured of a model."""

    model: str


class GetCompiling(Struct, frozen=True, array_like=True, tag="get_compiling"):
    """Asks which schedules of a model are being compiled."""

    model: str


class GetConfiguration(Struct, frozen=True, array_like=True, tag="get_configuration"):
    """Asks for the deployment `r` of every model."""


class Configure(Struct, frozen=True, array_like=True, tag="configure"):
    """Changes the deployment `r` of some models, all or none."""

    changes: Mapping[str, RSetting]
    expected_version: int | None


class Load(Struct, frozen=True, array_like=True, tag="load"):
    """Loads a model beside the others, in the newest version or the one that is named."""

    model: str
    version: str | None


class Unload(Struct, frozen=True, array_like=True, tag="unload"):
    """Takes a model out of service."""

    model: str


class GetRepository(Struct, frozen=True, array_like=True, tag="get_repository"):
    """Asks which models are loaded, and which may be."""


class Seen(Struct, frozen=True, array_like=True, tag="seen"):
    """Says that the last catalog has come, and that all requests from now on go by it. It has no answer."""


class Withdraw(Struct, frozen=True, array_like=True, tag="withdraw"):
    """Gives up the call of the same id."""


class Failure(Struct, frozen=True, array_like=True, tag="failure"):
    """A `ServerError` on its way."""

    code: str
    message: str
    retry_after_s: float | None
    details: dict[str, Any]

    @staticmethod
    def of(error: ServerError) -> Failure:
        """What crosses instead of the error."""
        return Failure(error.code, error.message, error.retry_after_s, error.details)

    def error(self) -> ServerError:
        """The same error on the other side."""
        return ServerError.of(self.code, self.message, self.retry_after_s, self.details)


class Alive(Struct, frozen=True, array_like=True, tag="alive"):
    """Answers a probe: the batch loop and the device work."""


class Measured(Struct, frozen=True, array_like=True, tag="measured"):
    """A model's curve, at the speeds of this moment."""

    curve: Curve


class Progress(Struct, frozen=True, array_like=True, tag="progress"):
    """What is compiled of a model; None where nothing is."""

    compiling: Compiling | None


class Deployed(Struct, frozen=True, array_like=True, tag="deployed"):
    """The configuration that holds now."""

    configuration: Configuration


class Done(Struct, frozen=True, array_like=True, tag="done"):
    """A model is loaded, or unloaded."""


class Repository(Struct, frozen=True, array_like=True, tag="repository"):
    """The models that are loaded or may be."""

    models: list[ModelState]


class Catalog(Struct, frozen=True, array_like=True, tag="catalog"):
    """The loaded models, the default first; the engine sends it before all else, and again whenever it changes."""

    models: list[ModelInfo]


class Call(Struct, frozen=True, array_like=True):
    """What an HTTP process asks, under an id of its own."""

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
    """What the engine says to the call of that id. The catalog answers no call."""

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
    """Writes a message behind what a buffer holds."""
    _encoder.encode_into(message, into, len(into))


def call_of(message: memoryview) -> Call:
    """What `to_bytes` wrote; raises msgspec.MsgspecError for all else."""
    return _calls.decode(message)


def reply_of(message: memoryview) -> Reply:
    """What `to_bytes` wrote; raises msgspec.MsgspecError for all else."""
    return _replies.decode(message)


def _plain(value: object) -> Any:
    if isinstance(value, Curve):
        return value.model_dump()
    raise TypeError(f"what is a {type(value).__name__} cannot cross")


def _curve(kind: type[Curve], said: Any) -> Curve:
    return kind.model_validate(said)


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_calls, _replies = msgspec.msgpack.Decoder(Call), msgspec.msgpack.Decoder(Reply, dec_hook=_curve)
