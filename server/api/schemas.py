"""The requests and answers of the HTTP API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from server.curve import AgreementOf
from server.dial import PlainR
from server.ipc.messages import Reason
from server.types import Activation

RSource = Literal["request", "deployment"]

LEAST_DEADLINE_MS = 1.0
"""No answer takes less. A shorter deadline is a mistake, for example a value in seconds."""

_NUMBER: JsonValue = {"type": "integer", "minimum": 0}
_KINDS_OF_R: list[JsonValue] = [_NUMBER, {"type": "array", "items": _NUMBER, "minItems": 1}, {"type": "string"}]
"""The types of `r`, for the API's description. `parse_setting` checks its values."""


class Dial(BaseModel):
    """Parameters of every request: the model, its `r`, and the deadline."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="A name from /v1/models; the first one by default.")
    r: Any = Field(
        None,
        description="Tokens merged in each block: a number, a list of one per block, or 'auto'.",
        json_schema_extra={"anyOf": [*_KINDS_OF_R, {"type": "null"}]},
    )
    max_r: int | None = Field(None, ge=0, description="With r=auto: the most tokens to merge in a block.")
    min_agreement: float | None = Field(
        None, ge=0, le=1, description="With r=auto: the least expected share of answers that equal those of r=0."
    )
    inflect: float | None = Field(
        None, ge=-1, le=1, description="With a single r: a ramp, -1 from 2r down to 0, 1 from 0 up to 2r."
    )
    deadline_ms: float | None = Field(
        None, ge=LEAST_DEADLINE_MS, description="Milliseconds after which the answer is useless."
    )


class Parameters(Dial):
    """The parameters of a classification, from the query, the form or the JSON body."""

    top_k: int | None = Field(None, ge=1, description="Number of classes in the answer, likeliest first; 5 by default.")
    function_to_apply: Activation | None = Field(
        None, description="Turns logits into scores: softmax, sigmoid or none; by default the model's own."
    )
    threshold: float | None = Field(
        None, ge=0, le=1, description="With sigmoid, instead of top_k: the least score of a class in the answer."
    )


class JsonBody(Parameters):
    """A JSON request: base64 images and parameters."""

    images: list[str] = Field(min_length=1, description="Images in base64, with or without a data: prefix.")


class PatchModel(BaseModel):
    """A live change of a model's deployment."""

    model_config = ConfigDict(extra="forbid")

    r: Any = Field(
        description="A number, a list of one per block, or 'auto'.", json_schema_extra={"anyOf": _KINDS_OF_R}
    )
    max_r: int | None = Field(None, ge=0, description="With r=auto: the most tokens to merge in a block.")
    min_agreement: float | None = Field(
        None, ge=0, le=1, description="With r=auto: the least expected share of answers that equal those of r=0."
    )
    inflect: float | None = Field(None, ge=-1, le=1, description="With a single r: a ramp.")


class PatchConfig(BaseModel):
    """A live change of several models."""

    model_config = ConfigDict(extra="forbid")

    models: dict[str, PatchModel] = Field(description="The models to change, by name.")


class DeployedR(BaseModel):
    """The r of requests that name none."""

    r: PlainR | Literal["auto"]
    max_r: int | None = Field(None, description="With auto: the most tokens to merge in a block.")
    min_agreement: float | None = Field(None, description="With auto: the least expected agreement with r=0.")


class Config(BaseModel):
    """The live configuration."""

    config_version: int = Field(description="Increases with every change; it is also the ETag.")
    models: dict[str, DeployedR]


class Class(BaseModel):
    label: str
    index: int
    score: float = Field(description="Probability, 0 to 1; a logit with function_to_apply=none.")


class ImageResult(BaseModel):
    filename: str | None = None
    top_k: list[Class]


class TimingsMs(BaseModel):
    """The time of a request by stage, in milliseconds: that of the slowest image in each stage."""

    decode: float
    queue: float
    inference: float
    total: float


class AutoChoice(BaseModel):
    """The reason why `auto` chose this r."""

    reason: Reason = Field(
        description="idle: the load needs no more than r=0; load: it needs this r; bounds: it needs a higher r "
        "than the request allows; shared: the image filled up a batch of this r."
    )
    expected_agreement: float | None = Field(
        description="Measured share of images that keep the answer of r=0; null if it was not measured."
    )


class ComputedBy(BaseModel):
    """The backend that computed an answer. Before a schedule is compiled, torch in fp32 replaces OpenVINO."""

    backend: str = Field(description="torch or openvino.")
    precision: str = Field(description="fp32, bf16, fp16 or fp8.")


class Classification(BaseModel):
    """The answer: the classes of each image, and how they were computed."""

    model: str
    r: PlainR = Field(description="Tokens merged in each block; a list if the blocks differ.")
    r_source: RSource = Field(description="The source of r, or of auto: the request or the deployment.")
    tuned: bool = Field(description="Whether tuned numbers were used: r lies in a band of the model's 'tuned'.")
    auto: AutoChoice | None = Field(None, description="With auto, the reason for this r.")
    tokens: int = Field(description="Tokens left after the last block.")
    batch_size: int = Field(description="Images in the batch; of several batches, in the largest.")
    config_version: int
    computed_by: ComputedBy
    results: list[ImageResult]
    timings_ms: TimingsMs


class BlockGroups(BaseModel):
    """The patches after one block."""

    block: int = Field(description="Counted from 1.")
    tokens: int = Field(description="Tokens that leave it, prefix included.")
    groups: list[int] = Field(
        description="For each patch, row by row, the first patch of its group; its own number if alone or first."
    )


class Seen(BaseModel):
    """The part of a photo that the model sees: the photo is resized, and cropped at its centre."""

    input_size: tuple[int, int] = Field(description="Height and width.")
    resize_size: tuple[int, int] = Field(
        description="With center, the first is the shorter side; with squash, height and width."
    )
    crop_mode: Literal["center", "squash"]


class Merging(BaseModel):
    """The classes of one photo, and the groups of its merged patches after every block."""

    model: str
    r: PlainR = Field(description="Tokens merged in each block; a list if the blocks differ.")
    r_source: RSource = Field(description="The source of r: the request or the deployment.")
    tuned: bool = Field(description="Whether tuned numbers were used: r lies in a band of the model's 'tuned'.")
    config_version: int
    computed_by: ComputedBy
    filename: str | None = None
    top_k: list[Class]
    seen: Seen
    grid: tuple[int, int] = Field(description="Rows and columns of patches.")
    patch: int = Field(description="Side of a patch in pixels of the model's input.")
    num_prefix_tokens: int = Field(description="Tokens that are not patches and never merge.")
    tokens: int = Field(description="Tokens that enter the first block, prefix included.")
    blocks: list[BlockGroups]
    timings_ms: TimingsMs


class AutoBounds(BaseModel):
    """The bounds of `auto`; null is no bound."""

    max_r: int | None
    min_agreement: float | None


class ModelSummary(BaseModel):
    name: str
    architecture: str
    source: str
    version: str = Field(description="The served one of its numbered folders; 1 without such folders.")
    is_default: bool
    r: PlainR | Literal["auto"] = Field(description="The deployment's r, for requests that name none.")
    auto: AutoBounds | None = Field(None, description="With auto, its bounds.")
    config_version: int


class Backend(BaseModel):
    """The backend that computes the answers."""

    name: str
    precision: str
    reason: str = Field(description="The reason for this backend and this precision.")


class Compiling(BaseModel):
    """Progress of the compilation while the server runs."""

    r: PlainR = Field(description="The r that is compiled now.")
    done: int = Field(description="Number of compiled schedules, out of total.")
    total: int = Field(description="Number of schedules that are compiled, are being compiled, or wait.")


class ModelEntry(BaseModel):
    """A model that is loaded or can be loaded."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
    reason: str = Field(description="Why it could not be loaded; otherwise empty.")


class ModelCard(BaseModel):
    """A model in the form of OpenAI's API."""

    id: str = Field(description="Its name.")
    object: Literal["model"] = "model"
    created: int = Field(default=0, description="Unknown: always 0.")
    owned_by: str = "tome-server"


class ModelDetail(ModelCard, ModelSummary):
    backend: Backend | None = Field(
        description="The backend that computes the answers; null before the model is on a device."
    )
    compiling: Compiling | None = Field(
        description="Progress of the background compilation; null if nothing is compiled."
    )
    num_classes: int = Field(description="0 for a model without a classifier, which gives only vectors.")
    classes: list[str]
    function_to_apply: Activation = Field(
        description="Turns its logits into scores if a request names no function; sigmoid for several labels."
    )
    num_features: int = Field(description="Length of an image's vector.")
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
        description="Lowest and highest r of each band that is computed with tuned numbers; empty without them."
    )
    ready: bool = Field(description="Whether to send images to this server; false once it is about to end.")


class BatchSeconds(BaseModel):
    """Seconds of a batch of n images: a + b n."""

    a: float
    b: float


class CurveNeighbours(BaseModel):
    """The quality of a search by vectors at one r."""

    same_index: float = Field(
        description="Share of the ten nearest photos of r=0 that are found in an index at this r."
    )
    cosine: float = Field(description="Mean cosine between a photo's vectors at this r and at r=0.")


class ModelCurveRow(BaseModel):
    """The speed and the agreement of one r."""

    r: PlainR
    schedule: list[int] = Field(description="r of each block.")
    tokens: int = Field(description="Tokens left after the last block.")
    gflops: float | None = Field(description="Operations of one image; null if they cannot be counted.")
    images_per_s: float = Field(description="In full batches, by the engine's present estimate.")
    batch_s: BatchSeconds
    agreement: float = Field(
        description="Share of photos that keep the answer of r=0; with agreement_of neighbours, share of the ten "
        "nearest photos of r=0 that a query at this r finds in an index at r=0."
    )
    agreement_interval: tuple[float, float] = Field(description="Its 95 % interval.")
    top1: float | None = Field(description="Share of labelled photos with the right answer; null without labels.")
    neighbours: CurveNeighbours | None = Field(description="With agreement_of neighbours, more about the search.")


class SpeedFrom(BaseModel):
    """The origin of a curve's speeds. Present batches refine them."""

    device: str = Field(description="Name of the processor.")
    backend: str
    precision: str
    measured: str = Field(description="The date, YYYY-MM-DD.")


class AgreementFrom(BaseModel):
    """The origin of a curve's agreement and top-1."""

    device: str = Field(description="Name of the processor.")
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
    data: list[ModelCard] = Field(description="The same models in the form of OpenAI's API.")


class ErrorDetail(BaseModel):
    code: str
    message: str
    details: dict[str, Any]


class ErrorBody(BaseModel):
    """The form of every error."""

    error: ErrorDetail
