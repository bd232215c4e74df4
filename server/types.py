"""Models and their configuration, for every process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from server.dial import AutoR, RSetting, Schedule, schedule_of, setting_to_json
from server.errors import InvalidError, NotFoundError, shown
from server.images.preprocessing import Preprocessing
from tome_core.schedule import mean_r, token_counts

Activation = Literal["softmax", "sigmoid", "none"]
"""Turns logits into scores: softmax over classes of which one is right, sigmoid for labels that apply independently."""

LABEL_THRESHOLD = 0.5
"""The default score from which a label applies."""

DEFAULT_TOP_K = 5

_token_counts = functools.lru_cache(4096)(token_counts)


OnDevice = Callable[[Callable[[], Any]], Any]
"""Runs work on the computing thread between two batches, and returns its result."""


class BatchKey(NamedTuple):
    """Images with the same key may share a batch: the same model, `r` of every block, input size and operation."""

    model: str
    schedule: Schedule
    input_size: tuple[int, int]
    operation: str = "forward"
    revision: str = ""


OnTimed = Callable[[Mapping[BatchKey, tuple[float, float]]], None]
"""Receives the lines of keys: seconds of a batch, and of each image in it."""


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """The backend of a model ("torch" or "openvino"), its precision, and the reason for this choice."""

    name: str
    precision: str
    reason: str


class ComputedBy(NamedTuple):
    """What computes an answer.

    Attributes:
        backend: "torch" or "openvino".
        precision: "fp32", "bf16", "fp16" or "fp8".
        is_fallback: Whether it computes in place of the model's own backend, which has not compiled this schedule yet.
    """

    backend: str
    precision: str
    is_fallback: bool = False


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
    """Facts about a loaded model that the HTTP side needs.

    Attributes:
        labels: Name of each class, in class order; empty for a model without a classifier.
        max_r: Most tokens that one block can merge.
        backend: Computes its answers; None before a device holds the model.
        decodes_jpeg: Whether the engine decodes JPEG files itself.
        tuned: Bands of `r` that it has tuned numbers for, (lowest, highest).
        num_features: Channels of its pooled features.
        activation: Default activation for its scores.
        version: The served version.
        revision: Identifies the files that it was loaded from. It differs between two loads of one name if the files
            do.
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
        """The `r` of each block. Raises InvalidError if this model cannot merge so."""
        if isinstance(r, AutoR):
            raise InvalidError("r is 'auto', which goes by the load of a server; here it must be a number or a list")
        return schedule_of(r, self.num_blocks, self.max_r, inflect)

    def check(self, r: RSetting) -> None:
        """Raises InvalidError if this model cannot merge so; any bounds of `auto` are fine."""
        if not isinstance(r, AutoR):
            self.schedule(r)

    def named(self, indices: Sequence[int], scores: Sequence[float]) -> list[dict[str, Any]]:
        """Classes in the form of an answer: label, index and score of each."""
        return [
            {"label": self.labels[index], "index": index, "score": score}
            for index, score in zip(indices, scores, strict=True)
        ]

    def most_classes(self, activation: Activation, top_k: int | None = None, threshold: float | None = None) -> int:
        """Most classes in the answer for an image.

        Args:
            activation: Turns logits into scores.
            top_k: The request's value; None for `DEFAULT_TOP_K`, or all classes if there are fewer.
            threshold: Least score of the classes in the answer, instead of `top_k`.

        Raises:
            InvalidError: A value is out of range, or they exclude each other.
        """
        num_classes = len(self.labels)
        if not num_classes:
            if (top_k, threshold) != (None, None):
                raise InvalidError(f"model {self.name} has no classifier; top_k and threshold do not apply")
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
        """Tokens that enter the first block, then tokens that leave each block."""
        return _token_counts(schedule, self.num_tokens, self.num_prefix_tokens)

    def is_tuned(self, schedule: Schedule) -> bool:
        """Whether tuned numbers compute a schedule: those of the band that holds its mean, as in `MergedViT.at`."""
        if not self.tuned:
            return False
        mean = mean_r(schedule)
        return any(low <= mean <= high for low, high in self.tuned)

    def batch_key(self, schedule: Schedule, operation: str = "forward") -> BatchKey:
        """The batch key of images for this model under a schedule."""
        return BatchKey(self.name, schedule, self.preprocessing.input_size, operation, self.revision)


@dataclass(frozen=True, slots=True)
class ModelState:
    """A model that is loaded or may be loaded.

    Attributes:
        name, version: The model and its version.
        state: READY serves; LOADING is being loaded; UNLOADING still answers its requests; UNAVAILABLE is not in
            memory.
        reason: Why it is unavailable.
    """

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
    reason: str = ""


def find_model(catalog: Mapping[str, ModelInfo], name: str | None) -> ModelInfo:
    """A model by name, or the first one. Raises NotFoundError if there is no such model."""
    if not catalog:
        raise NotFoundError("no model is loaded; POST /v2/repository/models/NAME/load loads one", models=[])
    if name is None:
        return next(iter(catalog.values()))
    if name not in catalog:
        raise NotFoundError(f"there is no model {shown(name)}; there are: {', '.join(catalog)}", models=list(catalog))
    return catalog[name]


@dataclass(frozen=True, slots=True)
class Configuration:
    """The part of the configuration that can change while the service runs.

    Attributes:
        version: Increases with every change, and never decreases.
        models: Each model's deployment `r`, for requests that name none.
    """

    version: int
    models: Mapping[str, RSetting]

    def to_json(self) -> dict[str, Any]:
        """The form in which it is stored."""
        return {"version": self.version, "models": {name: setting_to_json(r) for name, r in self.models.items()}}
