"""Models and their configuration, as every process knows them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from server.dial import AutoR, RSetting, Schedule, schedule_of, setting_to_json
from server.errors import InvalidError, NotFoundError, shown
from server.images.preprocessing import Preprocessing
from tome_core.schedule import mean_r, token_counts

Activation = Literal["softmax", "sigmoid", "none"]
"""What makes scores of logits: softmax of classes of which one is right, sigmoid of labels that hold each by itself."""

LABEL_THRESHOLD = 0.5
"""The least score of a label that holds, where nobody names another."""

DEFAULT_TOP_K = 5

_token_counts = functools.lru_cache(4096)(token_counts)


class BatchKey(NamedTuple):
    """Images that share it may share a batch: the same model, `r` in every block, input size and operation."""

    model: str
    schedule: Schedule
    input_size: tuple[int, int]
    operation: str = "forward"
    revision: str = ""


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What computes a model's answers: "torch" or "openvino", in which precision, and why this one."""

    name: str
    precision: str
    reason: str


class ComputedBy(NamedTuple):
    """What computes an answer.

    Attributes:
        backend: "torch" or "openvino".
        precision: "fp32", "bf16", "fp16" or "fp8".
        stands_in: It computes in place of the model's own backend, which has not compiled this schedule yet.
    """

    backend: str
    precision: str
    stands_in: bool = False


class Compiling(NamedTuple):
    """How far a model's schedules are compiled while the server runs.

    Attributes:
        schedule: The one that is compiled now.
        done: Schedules that are compiled, of those below.
        total: Schedules of this round: those that are done, the one of now, and those that wait.
    """

    schedule: Schedule
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the HTTP side must know of a loaded model.

    Attributes:
        labels: Words for each class, in class order; none for a model without a classifier.
        max_r: The most tokens that one block can merge.
        backend: What computes its answers; None before a device holds it.
        decodes_jpeg: The engine takes JPEG files as they came, and decodes them itself.
        tuned: Bands of `r` that it has tuned numbers for, (lowest, highest).
        num_features: Channels of its pooled features.
        activation: What makes scores of its logits where a request does not say.
        version: Which of its versions is served.
        revision: Which files it was loaded from: two loads of one name differ in it.
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
    tuned: tuple[tuple[int, int], ...] = ()
    num_features: int = 0
    activation: Activation = "softmax"
    version: str = "1"
    revision: str = ""

    def schedule(self, r: RSetting, inflect: float | None = None) -> Schedule:
        """The `r` of each block; raises InvalidError when this model cannot merge like that."""
        if isinstance(r, AutoR):
            raise InvalidError("r is 'auto', which goes by the load of a server; here it must be a number or a list")
        return schedule_of(r, self.num_blocks, self.max_r, inflect)

    def check(self, r: RSetting) -> None:
        """Raises InvalidError when this model cannot merge like that; any bounds of `auto` will do."""
        if not isinstance(r, AutoR):
            self.schedule(r)

    def named(self, indices: Sequence[int], scores: Sequence[float]) -> list[dict[str, Any]]:
        """Classes as they are told: label, index and score of each."""
        return [
            {"label": self.labels[index], "index": index, "score": score}
            for index, score in zip(indices, scores, strict=True)
        ]

    def most_classes(self, activation: Activation, top_k: int | None = None, threshold: float | None = None) -> int:
        """How many classes are named of an image, at most.

        Args:
            activation: What makes scores of logits.
            top_k: As asked; None for `DEFAULT_TOP_K`, or all where there are fewer.
            threshold: The least score of a class that is named, in the place of `top_k`.

        Raises:
            InvalidError: It is out of range, or they do not go together.
        """
        num_classes = len(self.labels)
        if not num_classes:
            if (top_k, threshold) != (None, None):
                raise InvalidError(f"model {self.name} has no classifier: top_k and threshold do not go with it")
            return 0
        if threshold is not None:
            if top_k is not None:
                raise InvalidError("threshold and top_k are both given; give one of them")
            if activation != "sigmoid":
                raise InvalidError(f"threshold goes with function_to_apply=sigmoid, not with {activation}")
            if not 0 <= threshold <= 1:
                raise InvalidError(f"threshold is {shown(threshold)}; it must lie between 0 and 1")
            return num_classes
        if top_k is None:
            return min(DEFAULT_TOP_K, num_classes)
        if not 1 <= top_k <= num_classes:
            raise InvalidError(f"top_k is {shown(top_k)}; it must lie between 1 and {num_classes}")
        return top_k

    def token_counts(self, schedule: Schedule) -> tuple[int, ...]:
        """Tokens entering the first block, then leaving each block."""
        return _token_counts(schedule, self.num_tokens, self.num_prefix_tokens)

    def is_tuned(self, schedule: Schedule) -> bool:
        """Whether tuned numbers compute it: those of the band that holds its mean, as in `MergedViT.at`."""
        if not self.tuned:
            return False
        mean = mean_r(schedule)
        return any(low <= mean <= high for low, high in self.tuned)

    def batch_key(self, schedule: Schedule, operation: str = "forward") -> BatchKey:
        """What images for this model under this schedule are batched by."""
        return BatchKey(self.name, schedule, self.preprocessing.input_size, operation, self.revision)


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model that is loaded or may be loaded.

    Attributes:
        name, version: Which one.
        state: READY serves; LOADING is made ready; UNLOADING answers what it has; UNAVAILABLE is not in memory.
        reason: Why it is not available.
    """

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
    reason: str = ""


def find_model(catalog: Mapping[str, ModelInfo], name: str | None) -> ModelInfo:
    """A model by name, or the first one; raises NotFoundError when there is none of that name."""
    if not catalog:
        raise NotFoundError("no model is loaded; POST /v2/repository/models/NAME/load loads one", models=[])
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

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return {"version": self.version, "models": {name: setting_to_json(r) for name, r in self.models.items()}}
