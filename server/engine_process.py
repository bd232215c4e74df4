"""The engine process: loads the models, warms them, and serves the local socket until it is told to end."""

from __future__ import annotations

import asyncio
import functools
import logging
import multiprocessing
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import uvloop

from server.batching.engine import LocalEngine
from server.batching.ladder import steps_of
from server.batching.policy import Rung
from server.calibration.facts import facts_of
from server.calibration.places import find
from server.calibration.timing import LARGER_BATCH, schedules, timed, timed_steps
from server.config.shared import Check
from server.config.store import ConfigStore, open_store
from server.curve import Curve, speed_staleness
from server.device.backend import BackendOptions
from server.device.device import Device
from server.device.explainer import Explainer
from server.device.models import LoadedModel, load_model
from server.device.preparing import Preparer
from server.device.runner import Runner
from server.device.torch_backend import set_threads
from server.dial import AutoR, RSetting, Schedule
from server.errors import EngineError, InvalidError
from server.images.nvjpeg import engine_decodes
from server.ipc.door import Door
from server.ipc.server import EngineServer
from server.lifetime import Pulse, configure_logging, end_with_parent, spare_the_collector, take_turns_quickly
from server.metrics import ENGINE_STARTS
from server.settings import ModelSpec, Settings, SettingsError
from server.tracing.start import start_tracing
from server.types import find_model
from server.unnamed import UnnamedFile

if TYPE_CHECKING:
    from server.tracing.provider import Tracing

logger = logging.getLogger(__name__)

_DRAIN_S = 30.0

OpenConfig = Callable[[Settings, Check], ConfigStore]


def main(
    settings: Settings,
    door: Door,
    agreed_file: Path | None,
    last_good: UnnamedFile,
    ready: UnnamedFile,
    pulse: Pulse,
) -> None:
    """Runs an engine process; writes into `ready` once it serves.

    Args:
        settings: What it serves, on one device.
        door: Where its clients come from.
        agreed_file: By which the engines of a server that keeps no state agree on the live configuration.
        last_good: Keeps the last good configuration over a restart of the engine.
        ready: Holds something from then on.
        pulse: Beats from then on.
    """
    configure_logging(settings.log_level, settings.log_format)
    end_with_parent()
    set_threads(settings.threads)
    try:
        tracing = start_tracing(multiprocessing.current_process().name, follows=True)
        open_config = functools.partial(open_store, otherwise=agreed_file, memory=last_good)
        engine = build_engine(settings, open_config, tracing)
    except (SettingsError, InvalidError, EngineError) as error:
        logger.error("%s", error)
        sys.exit(1)
    status = uvloop.run(_serve(engine, door, ready, pulse, settings.drain_delay_s + _DRAIN_S))
    if tracing is not None:
        tracing.close()
    sys.exit(status)


def build_engine(
    settings: Settings, open_config: OpenConfig = open_store, tracing: Tracing | None = None
) -> LocalEngine:
    """Loads and warms every model, and puts queue and device together.

    Args:
        settings: What to load, and how it runs.
        open_config: Gives the keeper of the live configuration.
        tracing: Makes the spans of requests and batches; None for none.

    Raises:
        SettingsError: A model cannot be loaded, its backend or decoder cannot be had, or the state file cannot be read.
        InvalidError: A deployment `r` is out of its model's range.
        EngineError: A model gives no numbers in this precision.
    """
    loaded = {spec.name: load_model(spec, settings.state_dir) for spec in settings.specs()}
    infos = {name: model.info for name, model in loaded.items()}

    def check(models: Mapping[str, RSetting]) -> None:
        for name, r in models.items():
            find_model(infos, name).check(r)

    store = open_config(settings, check)
    explainer = Explainer(loaded, settings.device)
    runner = Runner(
        loaded,
        settings.device,
        settings.precision,
        BackendOptions(settings.backend, settings.threads, settings.cache_dir(), settings.max_batch_size),
    )
    preparer = None
    if engine_decodes(settings.decode, runner.device):
        preparer = Preparer(runner.device, infos, settings.max_image_pixels)
    curves: dict[str, Curve] = {}
    steps: dict[str, list[Rung]] = {}
    for spec in settings.specs():
        name, model = spec.name, loaded[spec.name]
        r = store.configuration.models[name]
        model.info.check(r)
        runner.warm_up(model.info.batch_key(model.info.schedule(0)))
        if preparer is not None:
            preparer.warm_up(model.info.batch_key(model.info.schedule(0)))
        if curve := _curve(spec, model, runner, settings):
            curves[name], steps[name] = curve, steps_of(curve)
        else:
            steps[name] = timed_steps(model, schedules(model), _run(runner, model), settings.max_batch_size)
        chosen = [step.schedule for step in steps[name]] if isinstance(r, AutoR) else [model.info.schedule(r)]
        for schedule in chosen:
            if max(schedule) > 0:
                runner.warm_up(model.info.batch_key(schedule), is_likely=not isinstance(r, AutoR))
    return LocalEngine(
        {
            name: replace(model.info, backend=runner.backend(name), decodes_jpeg=preparer is not None)
            for name, model in loaded.items()
        },
        Device(runner, explainer, preparer),
        store,
        steps=steps,
        curves=curves,
        max_batch_size=settings.max_batch_size,
        max_queue_size=settings.max_queue_size,
        batch_timeout_s=settings.batch_timeout_s,
        drift_sample=settings.drift_sample,
        spans=None if tracing is None else tracing.of_engine(infos),
    )


def _curve(spec: ModelSpec, loaded: LoadedModel, runner: Runner, settings: Settings) -> Curve | None:
    """The curve that `auto` goes by, with this device's speeds; None where none holds, and then the log says why."""
    facts = facts_of(loaded, runner)
    if facts is None:
        return None
    curve, refusals = find(spec, loaded.info, facts, settings.state_dir)
    for refusal in refusals:
        logger.log(logging.INFO if curve else logging.WARNING, "%s", refusal)  # another one holds
    if curve is None:
        if refusals:
            logger.warning(
                "%s: r=auto takes evenly spaced r, and nobody knows how far their answers agree with r=0; "
                "tome-server calibrate measures it",
                spec.name,
            )
        return None
    if stale := speed_staleness(curve, facts):
        logger.info("%s: the curve of %s was %s: speeds are timed now", spec.name, curve.measured, stale)
        curve = timed(curve, loaded, _run(runner, loaded), settings.max_batch_size)
    return curve.model_copy(update={"facts": facts})


def _run(runner: Runner, loaded: LoadedModel) -> Callable[[Schedule, int], None]:
    """Computes a batch of so many black images."""
    info = loaded.info
    largest = torch.zeros(LARGER_BATCH, *info.preprocessing.input_size, 3, dtype=torch.uint8, device=runner.device)

    def run(schedule: Schedule, images: int) -> None:
        runner.run(info.batch_key(schedule), largest[:images])

    return run


async def _serve(engine: LocalEngine, door: Door, ready: UnnamedFile, pulse: Pulse, drain_s: float) -> int:
    """Serves until told to end (status 0), or until the engine is broken (status 1: a new process may do better).

    Told to end, it serves on until the HTTP processes have left, for so long at most: whoever signals a whole group of
    processes tells them at the same time.
    """
    told_to_end = asyncio.Event()
    beating = asyncio.create_task(pulse.beat())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_end.set)
    engine.start()
    server = EngineServer(engine, door)
    spare_the_collector()
    take_turns_quickly()
    ENGINE_STARTS.inc()
    ready.write(b"1")
    logger.info("serving %s", ", ".join(engine.catalog()))
    ends = [asyncio.create_task(told_to_end.wait()), asyncio.create_task(engine.broken())]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    server.close()
    if told_to_end.is_set():
        await server.left(drain_s)
        await engine.close()
    beating.cancel()
    return 0 if told_to_end.is_set() else 1
