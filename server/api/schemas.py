"""What HTTP clients send and see."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from server.curve import AgreementOf
from server.dial import PlainR
from server.ipc.messages import Reason
from server.types import Activation

RSource = Literal["request", "deployment"]

LEAST_DEADLINE_MS = 1.0
"""No answer takes less: a shorter deadline is a mistake, such as one in seconds."""

_NUMBER: JsonValue = {"type": "integer", "minimum": 0}
_KINDS_OF_R: list[JsonValue] = [_NUMBER, {"type": "array", "items": _NUMBER, "minItems": 1}, {"type": "string"}]
"""What `r` may be, for the API's description. `parse_setting` checks it."""


class Dial(BaseModel):
    """What any request may say: the model, its `r`, and how long the answer is waited for."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="A name from /v1/models; the first one when absent.")
    r: Any = Field(
        None,
        description="Tokens merged in each block: a number, a list of one per block, or 'auto'.",
        json_schema_extra={"anyOf": [*_KINDS_OF_R, {"type": "null"}]},
    )
    max_r: int | None = Field(None, ge=0, description="With r=auto: the most tokens that it may merge in a block.")
    min_agreement: float | None = Field(
        None, ge=0, le=1, description="With r=auto: the least expected share of answers that are those of r=0."
    )
    inflect: float | None = Field(
        None, ge=-1, le=1, description="With a single r: a ramp, -1 from 2r down to 0, 1 from 0 up to 2r."
    )
    deadline_ms: float | None = Field(
        None, ge=LEAST_DEADLINE_MS, description="Time after which the answer is worth nothing."
    )


class Parameters(Dial):
    """The parameters of a classification, from the query, the form or the JSON body."""

    top_k: int | None = Field(None, ge=1, description="Classes to answer with, likeliest first; 5 when absent.")
    function_to_apply: Activation | None = Field(
        None, description="What makes scores of logits: softmax, sigmoid or none; the model's own when absent."
    )
    threshold: float | None = Field(
        None, ge=0, le=1, description="With sigmoid, in place of top_k: the least score of a class that is named."
    )


class JsonBody(Parameters):
    """A JSON request: base64 images, and any of the parameters."""

    images: list[str] = Field(min_length=1, description="Images, base64, with or without a data: prefix.")


class PatchModel(BaseModel):
    """A live change of a model's deployment."""

    model_config = ConfigDict(extra="forbid")

    r: Any = Field(
        description="A number, a list of one per block, or 'auto'.", json_schema_extra={"anyOf": _KINDS_OF_R}
    )
    max_r: int | None = Field(None, ge=0, description="With r=auto: the most tokens that it may merge in a block.")
    min_agreement: float | None = Field(
        None, ge=0, le=1, description="With r=auto: the least expected share of answers that are those of r=0."
    )
    inflect: float | None = Field(None, ge=-1, le=1, description="With a single r: a ramp.")


class PatchConfig(BaseModel):
    """A live change of several models."""

    model_config = ConfigDict(extra="forbid")

    models: dict[str, PatchModel] = Field(description="The models to change, by name.")


class DeployedR(BaseModel):
    """What requests get that name no r."""

    r: PlainR | Literal["auto"]
    max_r: int | None = Field(None, description="With auto: the most tokens that it may merge in a block.")
    min_agreement: float | None = Field(None, description="With auto: the least expected agreement with r=0.")


class Config(BaseModel):
    """The live configuration."""

    config_version: int = Field(description="Grows with every change; also the ETag.")
    models: dict[str, DeployedR]


class Class(BaseModel):
    label: str
    index: int
    score: float = Field(description="Probability, 0 to 1; a logit with function_to_apply=none.")


class ImageResult(BaseModel):
    filename: str | None = None
    top_k: list[Class]


class TimingsMs(BaseModel):
    """Where the time of a request went, in milliseconds: the slowest image of each stage."""

    decode: float
    queue: float
    inference: float
    total: float


class AutoChoice(BaseModel):
    """Why `auto` took the r that it took."""

    reason: Reason = Field(
        description="idle: nothing asks for more than r=0; load: what waits and comes; bounds: the load asks for more "
        "than is allowed; shared: it filled up a batch that merges otherwise."
    )
    expected_agreement: float | None = Field(
        description="Share of images that keep the answer of r=0, as measured before; null where it was not."
    )


class ComputedBy(BaseModel):
    """What computed an answer. Until a schedule is compiled, torch in fp32 stands in for OpenVINO."""

    backend: str = Field(description="torch or openvino.")
    precision: str = Field(description="fp32, bf16, fp16 or fp8.")


class Classification(BaseModel):
    """The answer: what is in each image, and how it was computed."""

    model: str
    r: PlainR = Field(description="Tokens merged in each block; a list where the blocks differ.")
    r_source: RSource = Field(description="Who said so, or said auto.")
    tuned: bool = Field(description="Whether tuned numbers computed it: r lies in a band of the model's 'tuned'.")
    auto: AutoChoice | None = Field(None, description="With auto, why it took that r.")
    tokens: int = Field(description="Tokens left after the last block.")
    batch_size: int = Field(description="Images in the batch; the largest, where several images took several batches.")
    config_version: int
    computed_by: ComputedBy
    results: list[ImageResult]
    timings_ms: TimingsMs


class BlockGroups(BaseModel):
    """The patches after one block."""

    block: int = Field(description="Counted from 1.")
    tokens: int = Field(description="Tokens that leave it, prefix included.")
    groups: list[int] = Field(
        description="For each patch, row by row, the first patch of the group that it has merged into; "
        "its own number while it is alone or the first."
    )


class Seen(BaseModel):
    """What of a photo the model sees: it is resized, and what the input size holds of its centre is kept."""

    input_size: tuple[int, int] = Field(description="Height and width.")
    resize_size: tuple[int, int] = Field(description="For center the first is the shorter side; squash takes both.")
    crop_mode: Literal["center", "squash"]


class Merging(BaseModel):
    """The answer to one photo, and which of its patches are one token after every block."""

    model: str
    r: PlainR = Field(description="Tokens merged in each block; a list where the blocks differ.")
    r_source: RSource = Field(description="Who chose that r.")
    tuned: bool = Field(description="Whether tuned numbers computed it: r lies in a band of the model's 'tuned'.")
    config_version: int
    computed_by: ComputedBy
    filename: str | None = None
    top_k: list[Class]
    seen: Seen
    grid: tuple[int, int] = Field(description="Rows and columns of patches.")
    patch: int = Field(description="Side of a patch in pixels of the model's input.")
    num_prefix_tokens: int = Field(description="Tokens that are no patches, and never merge.")
    tokens: int = Field(description="Tokens that enter the first block, prefix included.")
    blocks: list[BlockGroups]
    timings_ms: TimingsMs


class AutoBounds(BaseModel):
    """What `auto` must keep to; null is no bound."""

    max_r: int | None
    min_agreement: float | None


class ModelSummary(BaseModel):
    name: str
    architecture: str
    source: str
    version: str = Field(description="Of its numbered folders the one that is served; 1 where there are none.")
    is_default: bool
    r: PlainR | Literal["auto"] = Field(description="The deployment's r, for requests that name none.")
    auto: AutoBounds | None = Field(None, description="With auto, what it must keep to.")
    config_version: int


class Backend(BaseModel):
    """What computes the answers."""

    name: str
    precision: str
    reason: str = Field(description="Why this one, and this precision.")


class Compiling(BaseModel):
    """How far schedules are compiled while the server runs."""

    r: PlainR = Field(description="The r that is compiled now.")
    done: int = Field(description="Schedules that are compiled, of those below.")
    total: int = Field(description="Schedules that are compiled, are being compiled, or wait for it.")


class ModelEntry(BaseModel):
    """A model that is loaded, or may be."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
    reason: str = Field(description="Why it could not be loaded; else empty.")


class ModelCard(BaseModel):
    """A model as clients of OpenAI's API know it."""

    id: str = Field(description="Its name.")
    object: Literal["model"] = "model"
    created: int = Field(default=0, description="Not known: always 0.")
    owned_by: str = "tome-server"


class ModelDetail(ModelCard, ModelSummary):
    backend: Backend | None = Field(description="What computes the answers; null before a device holds the model.")
    compiling: Compiling | None = Field(description="What is compiled in the background; null while nothing is.")
    num_classes: int = Field(description="0 for a model without a classifier, which gives vectors alone.")
    classes: list[str]
    function_to_apply: Activation = Field(
        description="What makes scores of its logits where a request does not say; sigmoid with several labels."
    )
    num_features: int = Field(description="Numbers of an image's vector.")
    input_size: tuple[int, int]
    num_blocks: int
    num_tokens: int
    num_prefix_tokens: int
    min_r: int
    max_r: int
    token_counts: dict[int, list[int]] = Field(
        description="For each r: tokens entering the first block, then leaving each block."
    )
    tuned: list[tuple[int, int]] = Field(
        description="Bands of r that are computed with tuned numbers, lowest and highest; empty without such numbers."
    )
    ready: bool = Field(description="Whether images should be sent here now; false once the server is about to end.")


class BatchSeconds(BaseModel):
    """Seconds of a batch of n images: a + b n."""

    a: float
    b: float


class CurveNeighbours(BaseModel):
    """What is left of a search by vectors at one r."""

    same_index: float = Field(description="Share of the ten nearest of r=0 that are found in an index at this r.")
    cosine: float = Field(description="Between a photo's vectors at this r and at r=0, on average.")


class ModelCurveRow(BaseModel):
    """What one r costs, and what it keeps."""

    r: PlainR
    schedule: list[int] = Field(description="r of each block.")
    tokens: int = Field(description="Tokens left after the last block.")
    gflops: float | None = Field(description="Of one image; null where they cannot be counted.")
    images_per_s: float = Field(description="In full batches, as the engine knows it now.")
    batch_s: BatchSeconds
    agreement: float = Field(
        description="Share of photos that keep the answer of r=0; with agreement_of neighbours, share of the ten "
        "nearest of r=0 that are found by a query at this r in an index at r=0."
    )
    agreement_interval: tuple[float, float] = Field(description="Its 95 % interval.")
    top1: float | None = Field(description="Share of labelled photos that are answered rightly; null without labels.")
    neighbours: CurveNeighbours | None = Field(description="With agreement_of neighbours, more of the search.")


class SpeedFrom(BaseModel):
    """Where the speeds of a curve come from. The batches that run now refine them."""

    device: str = Field(description="The processor by its name.")
    backend: str
    precision: str
    measured: str = Field(description="The date, YYYY-MM-DD.")


class AgreementFrom(BaseModel):
    """Where agreement and top-1 of a curve come from."""

    device: str = Field(description="The processor by its name.")
    backend: str
    precision: str
    measured: str = Field(description="The date, YYYY-MM-DD.")
    photos: int = Field(description="Number of photos.")


class ModelCurve(BaseModel):
    """The curve of a model, r=0 first."""

    model: str
    speed_from: SpeedFrom
    agreement_from: AgreementFrom
    agreement_of: AgreementOf = Field(
        description="top1: the likeliest class; labels: all labels of 0.5 or more; neighbours: the ten nearest photos."
    )
    rows: list[ModelCurveRow]


class ModelList(BaseModel):
    models: list[ModelSummary]
    object: Literal["list"] = "list"
    data: list[ModelCard] = Field(description="The same models, as clients of OpenAI's API know them.")


class ErrorDetail(BaseModel):
    code: str
    message: str
    details: dict[str, Any]


class ErrorBody(BaseModel):
    """Every error looks like this."""

    error: ErrorDetail
