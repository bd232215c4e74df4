"""Makes models ready to serve, at the start of an engine and while it serves others."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from server.batching.ladder import steps_of
from server.batching.loader import Found, Loaded
from server.calibration import speeds
from server.calibration.background import Ladder
from server.calibration.facts import facts_of
from server.calibration.places import find
from server.calibration.timing import LARGER_BATCH, Line, Run, arithmetic, schedules, timed, timed_steps
from server.curve import Curve, Facts, speed_staleness
from server.device.backend import BackendOptions
from server.device.by_model import ByModel
from server.device.device import Device
from server.device.explainer import Explainer
from server.device.models import LoadedModel, load_model
from server.device.preparing import Preparer
from server.device.runner import Runner, alone_on, device_of
from server.dial import AutoR, RSetting, Schedule
from server.errors import ServerError, SettingsError
from server.images.nvjpeg import engine_decodes
from server.model_config import BUNDLED
from server.model_spec import ModelSpec
from server.settings import Settings
from server.types import ModelInfo, OnDevice
from server.versions import versions_in

logger = logging.getLogger(__name__)

A = TypeVar("A")
Step = Callable[[Callable[[], Any]], Any]
"""Runs a function on the device, and returns its result."""


class ModelLoader:
    """Loads the models that the settings name, one at a time, and those of the repository.

    A model that is loaded while others serve delays them little. For a CPU, a separate thread reads and compiles it,
    and shares the cores with the batches. On a GPU, the computing thread does the work in pieces between its batches.
    The longest pieces copy the weights, compute the first batch (which may compile kernels), and record a graph.

    Args:
        settings: The server's settings.

    Attributes:
        device: Computes the models.

    Raises:
        SettingsError: There is no such device or decoder.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._place = device_of(settings.device)
        self.device = ByModel(self._place, engine_decodes(settings.decode, self._place))

    def find(self, name: str, version: str | None = None) -> Found:
        spec = self._spec(name, version)
        return Found(name, spec.version or "1", _revision(spec), spec.r or 0)

    def available(self) -> Mapping[str, Sequence[str]]:
        try:
            names = self._settings.known_models()
            return {name: self._versions(name) for name in names}
        except ServerError as error:  # the repository is gone; loaded models go on serving
            logger.warning("%s; only the models of --model may be loaded", error)
            return {spec.name: self._versions(spec.name) for spec in self._settings.model}

    def read(self, found: Found) -> LoadedModel:
        """A model with its weights, before it is on a device.

        Raises:
            SettingsError: See `load_model`.
        """
        loaded = load_model(self._spec(found.name, found.version), self._settings.state_dir)
        return replace(loaded, info=replace(loaded.info, version=found.version, revision=found.revision))

    def load(self, found: Found, r: RSetting, on_device: OnDevice) -> Loaded:
        loaded = self.read(found)
        if self._place.type != "cuda":
            return self.make_ready(found, loaded, r, beside=True)

        def step(work: Callable[[], A]) -> A:
            def alone() -> A:
                with alone_on(str(self._place)):
                    return work()

            return on_device(alone)  # type: ignore[no-any-return]

        return self.make_ready(found, loaded, r, step, beside=True)

    def make_ready(
        self,
        found: Found,
        loaded: LoadedModel,
        r: RSetting,
        step: Step = lambda work: work(),
        beside: bool = False,
    ) -> Loaded:
        """Brings a model to the device, and warms it for its deployment `r`.

        Args:
            found: Its source.
            loaded: The model.
            r: Its deployment `r`.
            step: Does a piece of work on the device.
            beside: Whether other models compute meanwhile.

        Raises:
            SettingsError: Its backend or its precision is not available.
            InvalidError: `r` is out of its range.
            EngineError: Its outputs are not finite in this precision.
        """
        settings, info = self._settings, loaded.info
        info.check(r)
        explainer = step(lambda: Explainer({info.name: loaded}, settings.device))
        runner: Runner = step(
            lambda: Runner({info.name: loaded}, settings.device, settings.precision, self._options(beside))
        )
        with ExitStack() as unless_ready:
            unless_ready.callback(runner.close)  # it may compile in the background
            preparer = None
            if self.device.prepares:
                preparer = Preparer(self._place, {info.name: info}, settings.max_image_pixels)

            def warm_up(schedule: Schedule, is_likely: bool = True) -> None:
                key = info.batch_key(schedule)
                step(lambda: runner.warm_up(key, is_likely and not beside))
                if preparer is not None and max(schedule) == 0:
                    step(lambda: preparer.warm_up(key))

            warm_up(info.schedule(0))
            run, largest = _run(runner, loaded), settings.max_batch_size
            facts = facts_of(loaded, runner)
            curve, lines = self._curve(found, loaded, runner, step, facts)
            later = runner.compiles(info.name)
            steps = (
                steps_of(curve) if curve else step(lambda: timed_steps(loaded, schedules(loaded), run, largest, later))
            )
            if not isinstance(r, AutoR):
                wanted = [info.schedule(r)]
            else:  # on a CPU they are compiled in the background, and `auto` uses only compiled ones
                wanted = [each.schedule for each in steps] if self._place.type == "cuda" else []
            for schedule in wanted:
                if max(schedule) > 0:
                    warm_up(schedule, is_likely=not isinstance(r, AutoR))
            while beside and step(runner.warm_further):  # what at the start is done in one piece
                pass
            ready = replace(info, backend=runner.backend(info.name), decodes_jpeg=self.device.prepares)

            def keep(lines: Mapping[Schedule, Line]) -> None:
                if curve is not None and facts is not None:
                    speeds.keep(found.name, curve, lines, facts, settings.state_dir)

            planned = [row.r for row in curve.rows] if curve else [each.schedule for each in steps]
            ladder = self._ladder(loaded, runner, planned, lines, keep)
            self.device.add(ready, Device(runner, explainer, preparer, ladder.begin))
            unless_ready.pop_all()
        return Loaded(ready, found.r, steps, curve)

    def free(self, info: ModelInfo) -> None:
        self.device.remove(info)
        if self._place.type == "cuda":
            torch.cuda.empty_cache()

    def _spec(self, name: str, version: str | None) -> ModelSpec:
        spec = self._settings.spec(name)
        if version is not None and spec.source.startswith("local-dir:"):
            spec = spec.model_copy(update={"version": version})
        elif version not in (None, "1"):
            raise SettingsError(f"model {name}: {spec.source} has one version, 1")
        return spec.in_its_version()

    def _versions(self, name: str) -> list[str]:
        spec = self._settings.spec(name)
        kind, _, folder = spec.source.partition(":")
        return versions_in(Path(folder)) if kind == "local-dir" else ["1"]

    def _options(self, beside: bool) -> BackendOptions:
        settings = self._settings
        options = BackendOptions(
            settings.backend,
            settings.threads,
            settings.cache_dir(),
            settings.max_batch_size,
            beside=beside,
            in_background=True,
        )
        num_models = max(len(settings.model), len(self.device) + 1)
        return replace(options, memory_bytes=options.memory_bytes // num_models)

    def _ladder(
        self,
        loaded: LoadedModel,
        runner: Runner,
        planned: Sequence[Schedule],
        lines: Mapping[Schedule, Line],
        keep: Callable[[Mapping[Schedule, Line]], None],
    ) -> Ladder:
        """The background work that compiles and times these schedules."""
        return Ladder(
            loaded.info,
            planned,
            functools.partial(runner.compile_later, loaded.info.name),
            _run(runner, loaded),
            arithmetic(loaded),
            self._settings.max_batch_size,
            lines,
            keep,
        )

    def _curve(
        self, found: Found, loaded: LoadedModel, runner: Runner, step: Step, facts: Facts | None
    ) -> tuple[Curve | None, Mapping[Schedule, Line]]:
        """The curve that `auto` uses, and the speeds in it that were measured on this device.

        The curve is None if none holds; the log says why. Speeds that were not measured here follow the arithmetic,
        from the time of r=0.
        """
        if facts is None:
            return None, {}
        name = found.name
        curve, refusals = find(self._spec(name, found.version), loaded.info, facts, self._settings.state_dir)
        for refusal in refusals:
            logger.log(logging.INFO if curve else logging.WARNING, "%s", refusal)  # another one holds
        if curve is None:
            if refusals:
                logger.warning(
                    "%s: r=auto takes evenly spaced r, and their agreement with r=0 is unknown; "
                    "tome-server calibrate measures it",
                    name,
                )
            return None, {}
        if stale := speed_staleness(curve, facts):
            if (kept := speeds.kept(name, curve, facts, self._settings.state_dir)) is not None:
                return kept, kept.lines
            later = runner.compiles(loaded.info.name)
            when = "while it serves" if later else "now"
            logger.info("%s: the curve of %s was %s: speeds are timed %s", name, curve.measured, stale, when)
            old, run, largest = curve, _run(runner, loaded), self._settings.max_batch_size
            return step(lambda: timed(old, loaded, run, largest, facts, roughly=later)), {}
        return curve, curve.lines


def _run(runner: Runner, loaded: LoadedModel) -> Run:
    """Computes a batch of black images, of the given size."""
    info = loaded.info
    largest = torch.zeros(LARGER_BATCH, *info.preprocessing.input_size, 3, dtype=torch.uint8, device=runner.device)

    def run(schedule: Schedule, images: int) -> None:
        runner.run(info.batch_key(schedule), largest[:images])

    return run


def _revision(spec: ModelSpec) -> str:
    """A hash of the model's files and settings. A model of a hub has only its settings."""
    digest = hashlib.sha256(repr((spec.source, spec.weights, spec.tuned)).encode())
    kind, _, rest = spec.source.partition(":")
    folder = BUNDLED if kind == "bundled" else Path(rest) if kind == "local-dir" else None
    files = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
    for file in [*files, *(Path(each) for each in (spec.weights, spec.tuned) if each)]:
        if file.is_file():
            status = file.stat()
            digest.update(repr((file.name, status.st_size, status.st_mtime_ns, status.st_ino)).encode())
    return digest.hexdigest()[:16]
