"""One device with one model: batches of files to answers, each stage in its own threads."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from msgspec import structs

from server.batching.splitting import run_split
from server.cpus import available_cpus
from server.device.backend import BackendOptions
from server.device.device import Device
from server.device.models import load_model
from server.device.preparing import Preparer
from server.device.runner import Runner
from server.device.torch_backend import set_threads
from server.errors import EngineError, ServerError
from server.images.image import Image
from server.images.nvjpeg import engine_decodes
from server.ipc.messages import Item
from server.lifetime import spare_the_collector, take_turns_quickly
from server.offline.model import Answer, Ask, Served, schedule_of
from server.offline.reader_processes import ReaderProcesses
from server.offline.reading import OF_A_FILE, Reader, ReaderThreads, Reads
from server.settings import Settings
from server.types import BatchKey, ModelInfo

logger = logging.getLogger(__name__)

_ERROR = (str, ServerError)

Stage = Callable[[BatchKey, Sequence[Any]], Sequence[Any]]

MOST_UNDER_WAY = 5
"""Batches: one is computed, one is launched after it, and others are read. They bound the memory."""

_MOST_PROCESSES = 16
"""Processes that read files. Each takes 50 MB; a few read small photos faster than any GPU computes them."""


class Computing:
    """Loads the first model of the settings to their one device, as `tome-server serve` does.

    Args:
        settings: The command's settings.
        devices: Number of devices that share the cores, including this one.

    Raises:
        SettingsError: The model cannot be loaded, or its backend or decoder is not available.
        EngineError: Processes that read files cannot be started.
    """

    def __init__(self, settings: Settings, devices: int = 1) -> None:
        set_threads(settings.threads)
        loaded = load_model(settings.specs()[0], settings.state_dir)
        info, max_pixels = loaded.info, settings.max_image_pixels
        options = BackendOptions(settings.backend, settings.threads, settings.cache_dir(), settings.max_batch_size)
        self._runner = Runner({info.name: loaded}, settings.device, settings.precision, options)
        self._preparer = None
        if engine_decodes(settings.decode, self._runner.device):
            self._preparer = Preparer(self._runner.device, {info.name: info}, max_pixels)
        self._device = Device(self._runner, None, self._preparer)
        info = replace(info, backend=self._runner.backend(info.name), decodes_jpeg=self._preparer is not None)
        self.served = Served(info, loaded.weights_sha256(), loaded.tuned)
        self._warm = ExitStack()
        self._reading = open_readers(info, max_pixels, devices)

    def warm_up(self, ask: Ask) -> None:
        """Compiles or records what `ask` needs, and excludes the existing objects from garbage collection.

        Raises:
            EngineError: The model gives no numbers.
        """
        key = self.served.info.batch_key(schedule_of(ask))
        self._runner.warm_up(key)
        if self._preparer is not None:
            self._preparer.warm_up(key)
        self._warm.enter_context(_undisturbed())

    def answers(self, ask: Ask, batches: Iterable[Sequence[str]]) -> Generator[list[Answer], None, None]:
        """Yields the answers to each batch of files, in order. It reads some batches ahead.

        Raises:
            EngineError: The device is broken, no image of a batch can be computed, or a process that reads has ended.
            UnavailableError: Decoder processes cannot be started.
        """
        preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        computing = ThreadPoolExecutor(1, thread_name_prefix="compute")
        under_way: deque[Future[list[Answer]]] = deque()
        with _ended(computing, preparing):
            for files in batches:
                prepared = preparing.submit(self._prepare, ask, self._reading.read(files))
                under_way.append(computing.submit(self._compute, ask, prepared))
                if len(under_way) == MOST_UNDER_WAY:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()

    def close(self) -> None:
        """Ends the threads and processes that read and decode."""
        self._reading.close()
        self._warm.close()

    def _prepare(self, ask: Ask, read: Sequence[Future[list[Image | str]]]) -> Sequence[Any]:
        """The device's input for each file, or an error: pixels on the GPU if the device prepares them, otherwise an
        item.
        """

        def prepare(images: Sequence[Any]) -> Sequence[Any]:
            request = structs.replace(ask, images=images)
            items = [Item(request, index) for index in range(len(images))]
            return self._run(ask, self._device.prepare, items) if self._device.prepares else items

        return _of_the_good([image for part in read for image in part.result()], prepare)

    def _compute(self, ask: Ask, prepared: Future[Sequence[Any]]) -> list[Answer]:
        answers = _of_the_good(prepared.result(), lambda work: self._run(ask, self._device.compute, work))
        return [answer.message if isinstance(answer, ServerError) else answer for answer in answers]

    def _run(self, ask: Ask, stage: Stage, work: Sequence[Any]) -> Sequence[Any]:
        """Runs a stage on a batch. If it fails, the batch is split until the failing image is alone."""
        key = self.served.info.batch_key(schedule_of(ask))
        try:
            return stage(key, work)
        except Exception as error:  # # the device may raise anything
            logger.debug("a batch of %d has failed", len(work), exc_info=error)

        async def run(part: Sequence[Any]) -> Sequence[Any]:
            return stage(key, part)

        try:
            self._device.check()
        except Exception as error:
            raise EngineError(f"{self._runner.device} does not work any more: {error}") from error
        outcomes = asyncio.run(run_split(run, work))
        failed = [each for each in outcomes if isinstance(each, ServerError) and not isinstance(each, OF_A_FILE)]
        if len(failed) == len(work) > 1:  # # then the images are not the reason
            raise failed[0]
        return outcomes


def open_readers(info: ModelInfo, max_pixels: int, devices: int = 1) -> Reads:
    """Opens the readers of files for a model: processes if the device decodes, because threads would wait for Python's
    lock; otherwise threads, which also decode.

    Raises:
        EngineError: The processes cannot be started.
    """
    if not info.decodes_jpeg:
        return ReaderThreads(Reader(info.preprocessing, False, max_pixels), available_cpus())
    return ReaderProcesses(info.preprocessing, max_pixels, min(max(1, available_cpus() // devices), _MOST_PROCESSES))


@contextmanager
def _ended(*stages: ThreadPoolExecutor) -> Iterator[None]:
    """On exit, drops the work that stages have not begun, and waits for the rest."""
    try:
        yield
    finally:
        for stage in stages:
            stage.shutdown(wait=False, cancel_futures=True)
        for stage in stages:
            stage.shutdown()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, threads switch quickly, and the garbage collector skips all objects of torch."""
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    take_turns_quickly()
    spare_the_collector()
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _of_the_good(outcomes: Sequence[Any], stage: Callable[[Sequence[Any]], Sequence[Any]]) -> Sequence[Any]:
    """Runs a stage on the good outcomes of the stage before it; errors keep their places."""
    good = [each for each in outcomes if not isinstance(each, _ERROR)]
    made = stage(good) if good else ()
    if len(good) == len(outcomes):
        return made
    rest = iter(made)
    return [each if isinstance(each, _ERROR) else next(rest) for each in outcomes]
