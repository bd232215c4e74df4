"""The engine process: loads the models, warms them, and serves the local socket until it is told to end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from multiprocessing.connection import Connection

import torch

from server.config_store import ConfigStore
from server.engine.engine import LocalEngine
from server.engine.runner import Runner
from server.engine.transport import serve_engine
from server.errors import InvalidError
from server.lifetime import configure_logging, end_with_parent
from server.metrics import ENGINE_STARTS, ENGINE_UP
from server.models import load_model
from server.settings import Settings, SettingsError
from server.types import BatchKey

logger = logging.getLogger(__name__)


def main(settings: Settings, socket_path: str, ready: Connection) -> None:
    """Runs the engine process; sends on `ready` once it serves."""
    configure_logging(settings.log_level)
    end_with_parent()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        engine = build_engine(settings)
    except (SettingsError, InvalidError) as error:
        logger.error("%s", error)
        sys.exit(1)
    asyncio.run(_serve(engine, socket_path, ready))


def build_engine(settings: Settings) -> LocalEngine:
    """Loads and warms every model, and puts queue and device together.

    Raises:
        SettingsError: A model cannot be loaded, or the state file cannot be read.
        InvalidError: A deployment `r` is out of its model's range.
    """
    loaded = {spec.name: load_model(spec) for spec in settings.specs()}
    store = ConfigStore(
        {spec.name: 0 if spec.r is None else spec.r for spec in settings.specs()}, settings.state_file()
    )
    runner = Runner(loaded, settings.device, settings.precision)
    engine = LocalEngine(
        {name: model.info for name, model in loaded.items()},
        runner.run_batch,
        store,
        max_batch_size=settings.max_batch_size,
        max_queue_size=settings.max_queue_size,
        batch_timeout_s=settings.batch_timeout_s,
    )
    infos = engine.catalog().values()
    runner.warm_up([BatchKey(info.name, (0,) * info.num_blocks, info.preprocessing.input_size) for info in infos])
    return engine


async def _serve(engine: LocalEngine, socket_path: str, ready: Connection) -> None:
    told_to_end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_end.set)
    if os.path.exists(socket_path):  # left by an engine that was killed
        os.unlink(socket_path)
    engine.start()
    server = await serve_engine(engine, socket_path)
    ENGINE_STARTS.inc()
    ENGINE_UP.set(1)
    ready.send(True)
    logger.info("serving %s", ", ".join(engine.catalog()))
    await told_to_end.wait()
    server.close()
    await engine.close()
