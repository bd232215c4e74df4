"""The terms of a request: its parameters, checked against the model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from server.api.patience import at_most
from server.api.schemas import LEAST_DEADLINE_MS, Parameters, RSource
from server.dial import AutoR, Schedule, parse_setting
from server.errors import InvalidError, shown
from server.ipc.messages import Answered
from server.types import Activation, ModelInfo, find_model


@dataclass(frozen=True, slots=True)
class Terms:
    """The parameters that apply to every image of a request.

    Attributes:
        info: The model.
        r: `r` per block, or the bounds of `auto`; None for the deployment's.
        top_k: Most classes in the answer.
        activation: Turns logits into scores.
        threshold: Least score of the classes in the answer; None for any.
        timeout_s: Seconds for the whole request.
        deadline: Time after which the answer is useless, in seconds of `time.monotonic()`.
    """

    info: ModelInfo
    r: Schedule | AutoR | None
    top_k: int
    activation: Activation
    threshold: float | None
    timeout_s: float
    deadline: float

    @property
    def r_source(self) -> RSource:
        """Where `r` comes from."""
        return "deployment" if self.r is None else "request"

    @property
    def schedule(self) -> Schedule | None:
        """`r` per block, if the request names it."""
        return self.r if isinstance(self.r, tuple) else None

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self.deadline - time.monotonic())

    def in_time(self) -> at_most:
        """Cancels work at the deadline, and raises DeadlineError; an async context manager."""
        return at_most(self.timeout_s, since=self.deadline - self.timeout_s)


def resolve(parameters: Parameters, catalog: dict[str, ModelInfo], start: float, longest_s: float) -> Terms:
    """Checks parameters against the model.

    Args:
        parameters: As the client sent them.
        catalog: The models, the default first.
        start: When the request arrived, in seconds of `time.monotonic()`.
        longest_s: Most seconds that it may take.

    Raises:
        NotFoundError: There is no such model.
        InvalidError: `r`, `top_k`, `threshold` or the deadline is out of range, or they exclude each other.
    """
    info = find_model(catalog, parameters.model)
    r: Schedule | AutoR | None = None
    if parameters.r is not None:
        setting = parse_setting(parameters.r, parameters.max_r, parameters.min_agreement)
        if isinstance(setting, AutoR) and parameters.inflect is not None:
            raise InvalidError("inflect goes with a single r, not with auto")
        r = setting if isinstance(setting, AutoR) else info.schedule(setting, parameters.inflect)
    elif (parameters.inflect, parameters.max_r, parameters.min_agreement) != (None, None, None):
        raise InvalidError("inflect goes with an r, and max_r and min_agreement with r=auto")
    activation = parameters.function_to_apply or info.activation
    timeout_s = longest_s if parameters.deadline_ms is None else parameters.deadline_ms / 1e3
    if timeout_s > longest_s:
        raise InvalidError(
            f"deadline_ms is {shown(parameters.deadline_ms)}; "
            f"it must lie between {LEAST_DEADLINE_MS:g} and {1e3 * longest_s:g}"
        )
    top_k = info.most_classes(activation, parameters.top_k, parameters.threshold)
    return Terms(info, r, top_k, activation, parameters.threshold, timeout_s, start + timeout_s)


def timings_of(answered: Answered[Any], decode_s: float, start: float) -> dict[str, float]:
    """Milliseconds of each stage since a request arrived: a `TimingsMs`."""
    return {
        "decode": 1e3 * decode_s,
        "queue": 1e3 * answered.queue_s,
        "inference": 1e3 * answered.inference_s,
        "total": 1e3 * (time.monotonic() - start),
    }
