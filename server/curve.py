"""The curve of a model: the speed and the agreement of each `r`, and what each of the two was measured on."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.dial import Schedule

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Date = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
AgreementOf = Literal["top1", "labels", "neighbours"]
"""The compared answer: the likeliest class, all labels of a multi-label model, or the nearest photos."""


class CurveError(ValueError):
    """A file holds no curve; the message says where it is wrong."""


def today() -> str:
    """The date in UTC, as curves write it: YYYY-MM-DD."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Facts(_Frozen):
    """The facts that a measurement depends on.

    Attributes:
        weights: sha256 of the weights' file.
        backend: "torch" or "openvino".
        device: The processor by its name.
        precision: "fp32", "bf16", "fp16" or "fp8".
        threads: CPU threads of torch; 0 on a GPU.
        versions: Of tome-server, torch, timm and the backend.
        tuned: sha256 of the file of tuned numbers; None without them.
    """

    weights: str = Field(pattern=r"^[0-9a-f]{64}$")
    backend: str
    device: str
    precision: str
    threads: Count
    versions: dict[str, str]
    tuned: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")


class Timed(_Frozen):
    """Where the speeds of a curve come from, if its agreement was measured elsewhere.

    Attributes:
        facts: What the speeds were measured on and with.
        measured: The date of the speeds.
    """

    facts: Facts
    measured: Date


class Neighbours(_Frozen):
    """A search by vectors: more than the agreement, which has queries at this `r` and an index at r=0.

    Attributes:
        same_index: Share of the ten nearest at r=0 that are found if the index has this `r`, too.
        cosine: Between a photo's vectors at this `r` and at r=0, on average.
    """

    same_index: Share
    cosine: Annotated[float, Field(ge=-1, le=1)]


class CurveRow(_Frozen):
    """One schedule.

    Attributes:
        r: Of each block.
        tokens: Left after the last block.
        gflops: Of one image; None if they cannot be counted.
        images_per_s: In full batches; None, as the two below, if speed was not measured.
        overhead_s: Seconds of a batch of any size.
        image_s: Seconds for each image of it.
        agreement: Share of photos that keep the answer of r=0, or of their nearest neighbours that are those of r=0.
        agreement_interval: Its 95 % interval.
        top1: Share of the labelled photos that get the right answer; None without labels.
        neighbours: More of a search by vectors; None if agreement is of classes.
    """

    r: Annotated[tuple[Count, ...], Field(min_length=1)]
    tokens: Annotated[int, Field(ge=1)]
    gflops: Annotated[float, Field(gt=0)] | None = None
    images_per_s: Annotated[float, Field(gt=0)] | None = None
    overhead_s: Annotated[float, Field(ge=0)] | None = None
    image_s: Annotated[float, Field(gt=0)] | None = None
    agreement: Share
    agreement_interval: tuple[Share, Share]
    top1: Share | None = None
    neighbours: Neighbours | None = None

    @property
    def line(self) -> tuple[float, float] | None:
        """Seconds of a batch and of each image in it; None if they were not measured."""
        return None if self.overhead_s is None or self.image_s is None else (self.overhead_s, self.image_s)

    def at(self, line: tuple[float, float], max_batch_size: int) -> CurveRow:
        """The same row at another speed."""
        overhead_s, image_s = line
        images_per_s = max_batch_size / (overhead_s + image_s * max_batch_size)
        return self.model_copy(
            update={"overhead_s": overhead_s, "image_s": image_s, "images_per_s": images_per_s},
        )


class Curve(_Frozen):
    """Rows of one model, r=0 first.

    Attributes:
        model: Its name.
        facts: What the agreement was measured on and with, and the speeds too unless `timed` says otherwise.
        measured: The date of that measurement.
        photos: Number of photos for the agreement.
        max_batch_size: Images of a full batch.
        agreement_of: What is compared with r=0.
        timed: Where the speeds come from, if they were measured apart from the agreement.
    """

    model: str
    facts: Facts
    measured: Date
    photos: Annotated[int, Field(ge=1)]
    max_batch_size: Annotated[int, Field(ge=1)]
    agreement_of: AgreementOf = "top1"
    timed: Timed | None = None
    rows: Annotated[tuple[CurveRow, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        first, schedules = self.rows[0], {row.r for row in self.rows}
        if max(first.r) > 0 or first.agreement < 1:
            raise ValueError("the first row must be r=0, which agrees with itself")
        if len(schedules) < len(self.rows) or len({len(r) for r in schedules}) > 1:
            raise ValueError("each r must stand there once, and list as many blocks as the others")
        return self

    @property
    def speed_from(self) -> Timed:
        """Where the speeds come from."""
        return self.timed or Timed(facts=self.facts, measured=self.measured)

    @property
    def lines(self) -> dict[Schedule, tuple[float, float]]:
        """The measured lines: seconds of a batch and of each image in it, for each schedule that was timed."""
        return {row.r: row.line for row in self.rows if row.line is not None}

    def to_json(self) -> str:
        """The stored form, with one row a line."""
        head = self.model_dump_json(exclude={"rows"}, exclude_none=True).removesuffix("}")
        rows = ",\n".join(f"  {row.model_dump_json(exclude_none=True)}" for row in self.rows)
        return f'{head},"rows":[\n{rows}\n]}}\n'

    @staticmethod
    def from_json(text: str | bytes) -> Curve:
        """Reads the stored form.

        Raises:
            CurveError: The text is not a curve.
        """
        try:
            return Curve.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"]))
            raise CurveError(f"it is no curve: {f'{place}: ' if place else ''}{problem['msg']}") from None

    def at(
        self, line: Callable[[Schedule], tuple[float, float]], max_batch_size: int, timed: Timed | None = None
    ) -> Curve:
        """The same curve at other speeds.

        Args:
            line: Seconds of a batch and of each image in it, for a schedule.
            max_batch_size: Images of a full batch.
            timed: Where the speeds come from; None keeps it.
        """
        rows = tuple(row.at(line(row.r), max_batch_size) for row in self.rows)
        update = {"rows": rows, "max_batch_size": max_batch_size, "timed": timed or self.timed}
        return self.model_copy(update=update)


def staleness(curve: Curve, facts: Facts) -> str | None:
    """Why the agreement of a curve does not hold here; None if it holds.

    It depends on the weights, the tuned numbers and float8. The answers at `r` and at r=0 have one precision, and in
    bfloat16 they agree as in float32 to half a point. Float8 rounds so much more that it has an agreement of its own.
    """
    made = curve.facts
    if made.weights != facts.weights:
        return f"made with other weights ({made.weights[:12]}, not {facts.weights[:12]})"
    if made.tuned != facts.tuned:
        if made.tuned is None:
            return "made without tuned numbers"
        return "made with tuned numbers that are not used" if facts.tuned is None else "made with other tuned numbers"
    if made.precision != facts.precision and "fp8" in (made.precision, facts.precision):
        return f"made with precision {made.precision}, not {facts.precision}"
    return None


def speed_staleness(curve: Curve, facts: Facts) -> str | None:
    """Why the speeds of a curve do not hold here; None if they hold. They depend on all facts."""
    made = curve.speed_from.facts
    if stale := staleness(curve, facts):
        return stale
    if any(row.line is None for row in curve.rows):
        return "made without speeds"
    for name in ("precision", "backend", "device", "threads"):
        if (before := getattr(made, name)) != (now := getattr(facts, name)):
            return f"made with {name} {before}, not {now}"
    for name, version in facts.versions.items():
        if made.versions.get(name) != version:
            return f"made with {name} {made.versions.get(name, 'of no known version')}, not {version}"
    return None
