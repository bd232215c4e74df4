"""The server's answers as frozen objects. The fields are those of `server/api/schemas.py`, which describes them in
full.

Words from closed sets (`r_source`, `reason`) are plain strings here, and unknown fields are ignored, because a newer
server may have more of them.
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
    """A class and its score."""

    label: str
    index: int
    score: float


@dataclass(frozen=True, slots=True)
class TimingsMs:
    """Milliseconds of a request's stages at the server: the slowest image of each stage."""

    decode: float
    queue: float
    inference: float
    total: float


@dataclass(frozen=True, slots=True)
class AutoChoice:
    """The reason for the r that `auto` chose; None is an agreement that nobody measured."""

    reason: str
    expected_agreement: float | None


@dataclass(frozen=True, slots=True)
class ComputedBy:
    """What computed an answer: the name of the backend, and its precision."""

    backend: str
    precision: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The classes of one image, and facts about the computation.

    Attributes:
        filename: The name of the image's file, if there is one.
        top_k: The likeliest classes, best first.
        r: Tokens merged in each block; a tuple if the blocks differ.
        r_source: Where r, or auto, comes from: "request" or "deployment".
        auto: The reason for the r, if auto chose it.
        tokens: Tokens left after the last block.
        batch_size: Images that were computed together.
        timings_ms: Times of the request, which may have had several images.
        tuned: Whether tuned numbers computed it; False for a server that does not say.
        computed_by: The backend; None for a server that does not say.
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
        """The name of the likeliest class."""
        return self.top.label


@dataclass(frozen=True, slots=True)
class AutoBounds:
    """The bounds of `auto`; None is no bound."""

    max_r: int | None
    min_agreement: float | None


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A served model: its deployment's `r`, and the bounds of auto."""

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
    """The backend, its precision, and the reason for this choice."""

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
    """The full description of a served model.

    Attributes:
        backend: None before a device holds the model.
        classes: Name of each class, in class order.
        compiling: None while nothing is compiled.
        input_size: Height and width in pixels.
        token_counts: For each r: tokens that enter the first block, then tokens that leave each block.
        function_to_apply: Default activation for its scores.
        num_features: Numbers of an image's vector; 0 for a server that does not say.
        tuned: Bands of r that tuned numbers compute, (lowest, highest).
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
    """More about a search by vectors: the share that is found if the index has this r too, and the mean cosine."""

    same_index: float
    cosine: float


@dataclass(frozen=True, slots=True)
class ModelCurveRow:
    """The cost and accuracy of one r. Shares are 0 to 1; the interval is one of 95 %."""

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
    """The cost and accuracy of each r of a model, r=0 first."""

    model: str
    speed_from: SpeedFrom
    agreement_from: AgreementFrom
    agreement_of: str = field(default="top1", kw_only=True)
    rows: tuple[ModelCurveRow, ...]


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vector of one image, and facts about the computation.

    Attributes:
        vector: Its numbers, scaled to length 1 unless the request says otherwise.
        r: Tokens merged in each block; a tuple if the blocks differ. Keep vectors of one r in one index.
        r_source: Where r, or auto, comes from: "request" or "deployment".
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
    """The vector of each image of a request."""
    return [_EMBEDDING.validate_python({**body, "vector": _vector(each["embedding"])}) for each in body["data"]]


def _vector(encoded: str) -> tuple[float, ...]:
    """Decodes base64 of little-endian float32."""
    numbers = array("f", base64.b64decode(encoded, validate=True))
    if sys.byteorder == "big":
        numbers.byteswap()
    return tuple(numbers)


def read_answers(body: Any, filenames: list[str | None]) -> list[Answer]:
    """The answer for each image of a request. They differ only in their classes."""
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
