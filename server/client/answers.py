"""What the server answers, as frozen objects. The fields are those of `server/api/schemas.py`, which says more of each.

Words from closed sets (`r_source`, `reason`) are plain strings here, and unknown fields are passed over: a newer server
may have more of them.
"""

from __future__ import annotations

import base64
import sys
from array import array
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter

from server.dial import PlainR


@dataclass(frozen=True, slots=True)
class Class:
    """A class, and how likely it is, 0 to 1."""

    label: str
    index: int
    score: float


@dataclass(frozen=True, slots=True)
class TimingsMs:
    """Where the time of a request went at the server, in milliseconds: the slowest image of each stage."""

    decode: float
    queue: float
    inference: float
    total: float


@dataclass(frozen=True, slots=True)
class AutoChoice:
    """Why `auto` took the r that it took; None is an agreement that nobody measured."""

    reason: str
    expected_agreement: float | None


@dataclass(frozen=True, slots=True)
class ComputedBy:
    """What computed an answer: the name of the backend, and its precision."""

    backend: str
    precision: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What is in one image, and how it was computed.

    Attributes:
        filename: The name of the file, where the image was one.
        top_k: The likeliest classes, best first.
        r: Tokens merged in each block; a tuple where the blocks differ.
        r_source: "request" or "deployment": who said so, or said auto.
        auto: With auto, why it took that r.
        tokens: Tokens left after the last block.
        batch_size: Images that were computed together.
        timings_ms: Of the request, which may have held several images.
        tuned: Whether tuned numbers computed it; False of a server that does not say.
        computed_by: The backend; None of a server that does not say.
    """

    filename: str | None
    top_k: tuple[Class, ...]
    model: str
    r: PlainR
    r_source: str
    auto: AutoChoice | None
    tokens: int
    batch_size: int
    config_version: int
    timings_ms: TimingsMs
    tuned: bool = False
    computed_by: ComputedBy | None = None

    @property
    def top(self) -> Class:
        """The likeliest class."""
        return self.top_k[0]

    @property
    def label(self) -> str:
        """The words for the likeliest class."""
        return self.top.label


@dataclass(frozen=True, slots=True)
class AutoBounds:
    """What `auto` must keep to; None is no bound."""

    max_r: int | None
    min_agreement: float | None


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model that is served: its deployment's `r`, and with auto the bounds of it."""

    name: str
    architecture: str
    source: str
    version: str = field(default="1", kw_only=True)
    is_default: bool
    r: PlainR | Literal["auto"]
    auto: AutoBounds | None
    config_version: int


@dataclass(frozen=True, slots=True)
class Backend:
    """What computes the answers, in which precision, and why this one."""

    name: str
    precision: str
    reason: str


@dataclass(frozen=True, slots=True)
class Compiling:
    """How far a model's schedules are compiled: the `r` of now, those that are done, and all of them."""

    r: PlainR
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Model(ModelSummary):
    """All about a model that is served.

    Attributes:
        backend: None before a device holds the model.
        compiling: None while nothing is compiled.
        classes: Words for each class, in class order.
        input_size: Height and width in pixels.
        token_counts: For each r: tokens entering the first block, then leaving each block.
        function_to_apply: What makes scores of its logits where a request does not say.
        num_features: Numbers of an image's vector; 0 of a server that does not say.
        tuned: Bands of r that are computed with tuned numbers, (lowest, highest).
        ready: Whether images should be sent there now.
    """

    backend: Backend | None
    compiling: Compiling | None = field(default=None, kw_only=True)
    num_classes: int
    classes: tuple[str, ...]
    function_to_apply: str = field(default="softmax", kw_only=True)
    num_features: int = field(default=0, kw_only=True)
    input_size: tuple[int, int]
    num_blocks: int
    num_tokens: int
    num_prefix_tokens: int
    min_r: int
    max_r: int
    token_counts: dict[int, tuple[int, ...]]
    tuned: tuple[tuple[int, int], ...] = ()
    ready: bool = True


@dataclass(frozen=True, slots=True)
class BatchSeconds:
    """Seconds of a batch of n images: a + b n."""

    a: float
    b: float


@dataclass(frozen=True, slots=True)
class CurveNeighbours:
    """More of a search by vectors: the share that is found where the index has this r, too, and the mean cosine."""

    same_index: float
    cosine: float


@dataclass(frozen=True, slots=True)
class ModelCurveRow:
    """What one r costs, and what it keeps: shares are 0 to 1, the interval is one of 95 %."""

    r: PlainR
    schedule: tuple[int, ...]
    tokens: int
    gflops: float | None
    images_per_s: float
    batch_s: BatchSeconds
    agreement: float
    agreement_interval: tuple[float, float]
    top1: float | None
    neighbours: CurveNeighbours | None = None


@dataclass(frozen=True, slots=True)
class SpeedFrom:
    """What the speeds of a curve were measured on, and the date."""

    device: str
    backend: str
    precision: str
    measured: str


@dataclass(frozen=True, slots=True)
class AgreementFrom:
    """What agreement and top-1 of a curve were measured on, the date, and the number of photos."""

    device: str
    backend: str
    precision: str
    measured: str
    photos: int


@dataclass(frozen=True, slots=True)
class ModelCurve:
    """The speed and the agreement of each r of a model, r=0 first."""

    model: str
    speed_from: SpeedFrom
    agreement_from: AgreementFrom
    agreement_of: str = field(default="top1", kw_only=True)
    rows: tuple[ModelCurveRow, ...]


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vector of one image, and how it was computed.

    Attributes:
        vector: Its numbers, of length 1 unless it was asked for as it is.
        r: Tokens merged in each block; a tuple where the blocks differ. Vectors of one r belong into one index.
        r_source: "request" or "deployment": who said so, or said auto.
        tokens: Tokens left after the last block.
    """

    vector: tuple[float, ...]
    model: str
    r: PlainR
    r_source: str
    tokens: int


_ANSWER, _EMBEDDING = TypeAdapter(Answer), TypeAdapter(Embedding)
_MODEL, _SUMMARY, _CURVE = TypeAdapter(Model), TypeAdapter(ModelSummary), TypeAdapter(ModelCurve)


def read_embeddings(body: Any) -> list[Embedding]:
    """The vector of each image of one request."""
    return [_EMBEDDING.validate_python({**body, "vector": _vector(each["embedding"])}) for each in body["data"]]


def _vector(encoded: str) -> tuple[float, ...]:
    """The numbers of base64 of little-endian float32."""
    numbers = array("f", base64.b64decode(encoded, validate=True))
    if sys.byteorder == "big":
        numbers.byteswap()
    return tuple(numbers)


def read_answers(body: Any, filenames: list[str | None]) -> list[Answer]:
    """The answer for each image of one request, which share all but their classes."""
    pairs = zip(body["results"], filenames, strict=True)
    return [_ANSWER.validate_python({**body, **result, "filename": name}) for result, name in pairs]


def read_models(body: Any) -> list[ModelSummary]:
    return [read_summary(each) for each in body["models"]]


def read_summary(body: Any) -> ModelSummary:
    return _SUMMARY.validate_python(body)


def read_model(body: Any) -> Model:
    return _MODEL.validate_python(body)


def read_curve(body: Any) -> ModelCurve:
    return _CURVE.validate_python(body)
