"""The engine process: loads and warms the models, and serves the local socket until SIGTERM."""

from __future__ import annotations

import asyncio
import functools
import logging
import multiprocessing
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from server.batching.engine import LocalEngine
from server.batching.loader import Found, Loaded
from server.config.model_set import ModelSet
from server.config.shared import Check
from server.config.store import ConfigStore, open_store
from server.device.models import LoadedModel
from server.device.runner import pick_device
from server.device.torch_backend import one_thread, set_threads
from server.dial import RSetting, text_of
from server.documents import sentence
from server.errors import InvalidError, ServerError, SettingsError
from server.ipc.door import Door
from server.ipc.server import EngineServer
from server.lifetime import Pulse, configure_logging, end_with_parent, leave, spare_the_collector, take_turns_quickly
from server.loader import ModelLoader
from server.metrics import ENGINE_STARTS
from server.settings import Settings
from server.tracing.start import start_tracing
from server.types import ModelInfo, find_model
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
    models: UnnamedFile,
    ready: UnnamedFile,
    refused: UnnamedFile,
    pulse: Pulse,
) -> None:
    """Runs an engine process.

    Args:
        settings: Its models, on one device.
        door: Brings its clients.
        agreed_file: Shares the live configuration among the engines of a server that keeps no state.
        last_good: Keeps the last good configuration over a restart of the engine.
        models: Keeps loads and unloads of models, and shares them among the engines of a server.
        ready: Is written once the engine serves.
        refused: Gets the message about a wrong setting.
        pulse: Beats from then on.
    """
    configure_logging(settings.log_level, settings.log_format)
    end_with_parent()
    set_threads(settings.threads)
    try:
        tracing = start_tracing(multiprocessing.current_process().name, follows=True)
        open_config = functools.partial(open_store, otherwise=agreed_file, memory=last_good)
        engine = build_engine(settings, open_config, tracing, ModelSet(settings, models))
    except (SettingsError, ServerError) as error:
        if ready.read():  # it served before, and is started again
            logger.error("%s", error)
        refused.clear()
        refused.write(str(error).encode())
        sys.exit(1)
    place = pick_device(settings.device)
    status = uvloop.run(_serve(engine, door, ready, pulse, settings.drain_delay_s + _DRAIN_S, place))
    if tracing is not None:
        tracing.close()
    leave(status)


def build_engine(
    settings: Settings,
    open_config: OpenConfig = open_store,
    tracing: Tracing | None = None,
    models: ModelSet | None = None,
    changes_models: bool = True,
) -> LocalEngine:
    """Loads and warms every model, and connects queue and device.

    Args:
        settings: The models, and how they run.
        open_config: Opens the store of the live configuration.
        tracing: Makes the spans of requests and batches; None for none.
        models: The loads and unloads since the start.
        changes_models: Whether models may be loaded and unloaded at run time.

    Raises:
        SettingsError: A model cannot be loaded, its backend or decoder is not available, or the state file cannot be
            read.
        InvalidError: A deployment `r` is out of its model's range.
        EngineError: A model computes no finite numbers in this precision.
    """
    loader = ModelLoader(settings)
    changed = models.entries() if models is not None else {}
    read = _read(settings, loader, changed)
    infos = {found.name: loaded.info for found, loaded in read}

    def check(said: Mapping[str, RSetting]) -> None:
        for name, r in said.items():
            if name in infos or not _may_be_loaded(settings, name):  # other models are checked when they are loaded
                find_model(infos, name).check(r)

    store = open_config(settings, check)
    for spec in settings.model:
        if spec.name not in infos:
            store.remove(spec.name)
    ready: dict[str, Loaded] = {}
    for found, loaded in read:
        name = found.name
        if name not in store.configuration.models:
            store.add(name, found.r)
        try:
            ready[name] = loader.make_ready(found, loaded, store.configuration.models[name])
            infos[name] = ready[name].info
        except Exception as error:  # any error of torch, such as too little memory
            if name not in changed:
                raise
            _leave_out(name, error)
            store.remove(name)
            del infos[name]
    return LocalEngine(
        infos,
        loader.device,
        store,
        steps={name: each.steps for name, each in ready.items()},
        curves={name: each.curve for name, each in ready.items() if each.curve is not None},
        max_batch_size=settings.max_batch_size,
        max_queue_size=settings.max_queue_size,
        batch_timeout_s=settings.batch_timeout_s,
        drift_sample=settings.drift_sample,
        loader=loader if changes_models else None,
        kept=models,
        linger_s=settings.deadline_s,  # an answer after the deadline is useless
        spans=None if tracing is None else tracing.of_engine(infos),
    )


def _may_be_loaded(settings: Settings, name: str) -> bool:
    """Whether the settings or the repository have a model of this name. An unreadable repository may have any."""
    try:
        return name in settings.known_models()
    except InvalidError:
        return True


def _read(
    settings: Settings, loader: ModelLoader, changed: Mapping[str, str | None]
) -> list[tuple[Found, LoadedModel]]:
    """The models of the settings that were not unloaded live, and the models that were loaded live.

    A live model that can no longer be loaded is left out.
    """
    read = []
    for name in dict.fromkeys([*(spec.name for spec in settings.model), *changed]):
        if name in changed and changed[name] is None:
            logger.info("%s, unloaded live earlier, stays unloaded", name)
            continue
        try:
            found = loader.find(name, changed.get(name))
            with one_thread():
                read.append((found, loader.read(found)))
        except Exception as error:  # any error of torch, timm or the disk
            if name not in changed:
                raise
            _leave_out(name, error)
    return read


def _description(info: ModelInfo, r: RSetting, place: str) -> str:
    """What serves, on what, and at which `r`."""
    by = info.backend
    how = f" by {by.name} in {by.precision} ({by.reason})" if by else ""
    return f"{info.name} on {place}{how} at r={text_of(r)}"


def _leave_out(name: str, error: Exception) -> None:
    """Logs why a live model is missing after a restart. The server starts without it."""
    is_told = isinstance(error, SettingsError | ServerError)
    logger.error(
        "%s; it was loaded before the restart, and is not loaded now",
        error if is_told else f"model {name} cannot be loaded: {sentence(error)}",
        exc_info=None if is_told else error,
    )


async def _serve(engine: LocalEngine, door: Door, ready: UnnamedFile, pulse: Pulse, drain_s: float, place: str) -> int:
    """Serves until SIGTERM (status 0) or until the engine is broken (status 1: a new process may succeed).

    After SIGTERM it serves until the HTTP processes have left, at most `drain_s`, because a signal to a process group
    reaches all of them at once.
    """
    told_to_end = asyncio.Event()
    beating = asyncio.create_task(pulse.beat())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_end.set)
    engine.start()
    server = EngineServer(engine, door)
    engine.on_catalog(server.show_catalog)
    spare_the_collector()
    take_turns_quickly()
    ENGINE_STARTS.inc()
    ready.write(b"1")
    configuration = await engine.configuration()
    for name, info in engine.catalog().items():
        logger.info("serving %s", _description(info, configuration.models[name], place))
    ends = [asyncio.create_task(told_to_end.wait()), asyncio.create_task(engine.broken())]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    server.close()
    if told_to_end.is_set():
        await server.left(drain_s)
        await engine.close()
    beating.cancel()
    return 0 if told_to_end.is_set() else 1
