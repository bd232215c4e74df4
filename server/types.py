"""The nouns that travel through the service. They know neither torch nor HTTP."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from server.dial import AutoR, RSetting, Schedule, schedule_of, setting_from_json, setting_to_json
from server.errors import InvalidError, NotFoundError, shown
from server.images.preprocessing import Preprocessing
from tome_core.schedule import token_counts

if TYPE_CHECKING:
    from server.curve import Curve


_token_counts = functools.lru_cache(4096)(token_counts)


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What computes a model's answers: "torch" or "openvino", in which precision, and why this one."""

    name: str
    precision: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the HTTP side must know of a loaded model.

    Attributes:
        labels: Words for each class, in class order.
        max_r: The most tokens that one block can merge.
        backend: What computes its answers; None before a device holds it.
        decodes_jpeg: The engine takes JPEG files as they came, and decodes them itself.
    """

    name: str
    architecture: str
    source: str
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    num_blocks: int
    num_tokens: int
    num_prefix_tokens: int
    max_r: int
    backend: BackendInfo | None = None
    decodes_jpeg: bool = False

    def schedule(self, r: RSetting, inflect: float | None = None) -> Schedule:
        """The `r` of each block; raises InvalidError when this model cannot merge like that."""
        if isinstance(r, AutoR):
            raise InvalidError("r is 'auto', which goes by the load of a server; here it must be a number or a list")
        return schedule_of(r, self.num_blocks, self.max_r, inflect)

    def check(self, r: RSetting) -> None:
        """Raises InvalidError when this model cannot merge like that; any bounds of `auto` will do."""
        if not isinstance(r, AutoR):
            self.schedule(r)

    def token_counts(self, schedule: Schedule) -> tuple[int, ...]:
        """Tokens entering the first block, then leaving each block."""
        return _token_counts(schedule, self.num_tokens, self.num_prefix_tokens)

    def batch_key(self, schedule: Schedule) -> BatchKey:
        """What jobs for this model under this schedule are batched by."""
        return BatchKey(self.name, schedule, self.preprocessing.input_size)

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_wire(wire: dict[str, Any]) -> ModelInfo:
        pre: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in wire["preprocessing"].items()
        }
        backend = wire["backend"] and BackendInfo(**wire["backend"])
        labels = tuple(wire["labels"])
        return ModelInfo(**{**wire, "labels": labels, "preprocessing": Preprocessing(**pre), "backend": backend})


def find_model(catalog: Mapping[str, ModelInfo], name: str | None) -> ModelInfo:
    """A model by name, or the first one; raises NotFoundError when there is none of that name."""
    if name is None:
        return next(iter(catalog.values()))
    if name not in catalog:
        raise NotFoundError(f"there is no model {shown(name)}; there are: {', '.join(catalog)}", models=list(catalog))
    return catalog[name]


@dataclass(frozen=True, slots=True)
class Configuration:
    """What can be changed while the service runs.

    Attributes:
        version: Grows with every change, and never goes back.
        models: Each model's deployment `r`: what requests get which name none.
    """

    version: int
    models: Mapping[str, RSetting]

    def to_wire(self) -> dict[str, Any]:
        return {"version": self.version, "models": {name: setting_to_json(r) for name, r in self.models.items()}}

    @staticmethod
    def from_wire(wire: dict[str, Any]) -> Configuration:
        return Configuration(
            int(wire["version"]), {name: setting_from_json(r) for name, r in dict(wire["models"]).items()}
        )


@dataclass(frozen=True, slots=True)
class BatchKey:
    """Jobs that share it may share a batch: the same model, the same `r` in every block, the same input size."""

    model: str
    schedule: Schedule
    input_size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Job:
    """One image to classify.

    Attributes:
        pixels: RGB bytes, height x width x 3, as the model's preprocessing wants them, not yet normalised; or a JPEG
            file, for an engine that decodes.
        r: `r` per block as asked, or the bounds of `auto`; None takes the deployment's.
        top_k: How many classes to answer with.
        timeout_s: Time left until the deadline.
        jpeg_pixels: Width x height of the JPEG file that `pixels` is; 0 where it is none.
    """

    model: str
    pixels: bytes
    r: Schedule | AutoR | None
    top_k: int
    timeout_s: float
    jpeg_pixels: int = 0


@dataclass(frozen=True, slots=True)
class TopK:
    """The likeliest classes of one image, best first, with their probabilities."""

    indices: list[int]
    scores: list[float]


Reason = Literal["idle", "load", "bounds", "shared"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A schedule that `auto` chose.

    Attributes:
        schedule: `r` of each block.
        reason: `AutoDial.why` says what the words mean.
        expected_agreement: Share of images that keep the answer of r=0, or None where nobody measured it.
    """

    schedule: Schedule
    reason: Reason
    expected_agreement: float | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answered job: the classes, and how they were computed. Durations in seconds.

    Attributes:
        auto: What `auto` chose, where it was to choose.
    """

    top_k: TopK
    schedule: Schedule
    batch_size: int
    config_version: int
    queue_s: float
    inference_s: float
    auto: Choice | None = None


@dataclass(frozen=True, slots=True)
class Merges:
    """What merged in one image.

    Attributes:
        grid: Rows and columns of patches.
        patch: Side of a patch in pixels of the model's input.
        groups: For each block, for each patch row by row, the first patch of the group that it is in after that block.
    """

    grid: tuple[int, int]
    patch: int
    groups: list[list[int]]


@dataclass(frozen=True, slots=True)
class Explanation:
    """One explained job: the answer, and what merged on the way to it."""

    prediction: Prediction
    merges: Merges


class Engine(Protocol):
    """The device side as the HTTP side sees it: in this process, or behind a local socket."""

    def catalog(self) -> dict[str, ModelInfo]:
        """The loaded models by name, the default first; raises UnavailableError before they are known."""
        ...

    async def classify(self, job: Job) -> Prediction:
        """Answers one job or raises a ServerError; cancelling the call withdraws the job."""
        ...

    async def explain(self, job: Job) -> Explanation:
        """As `classify`, and says which patches merged in every block."""
        ...

    async def choose(self, model: str, bounds: AutoR) -> Choice:
        """What `auto` would take at this moment: for several images that are to share one `r`."""
        ...

    async def curve(self, model: str) -> Curve:
        """What was measured of the model, at the speeds of this moment; raises NotFoundError where nothing was."""
        ...

    async def configuration(self) -> Configuration:
        """The deployment `r` of every model at this moment."""
        ...

    async def configure(self, changes: Mapping[str, RSetting], expected_version: int | None) -> Configuration:
        """Changes the deployment `r` of some models, all or none, from the next job on.

        Raises:
            NotFoundError: There is no such model.
            InvalidError: A model cannot merge like that.
            ConflictError: The version is no longer the expected one.
            UnavailableError: The configuration is shared, and whoever keeps it does not answer.
        """
        ...

    async def check(self) -> None:
        """Returns once the batch loop has answered; raises UnavailableError when it does not."""
        ...
