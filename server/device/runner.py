"""The device: loaded models in, batches of pixels through them, results out. Called from one thread."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from server.device.backend import BackendOptions
from server.device.choosing import choose_backend
from server.device.models import LoadedModel
from server.device.outcome import Found, Wanted, gathered, wanted_by
from server.device.prepared import Prepared, is_whole, rows
from server.dial import Schedule, r_of, text_of
from server.documents import sentence
from server.errors import EngineError, ServerError, SettingsError
from server.ipc.messages import TopK, Vector
from server.types import Activation, BackendInfo, BatchKey, Compiling, ComputedBy
from tome_core import MergedViT

logger = logging.getLogger(__name__)


class Launched:
    """A batch on its way through the device.

    Args:
        name: What computes it.
        columns: What is wanted of its outputs, as `gathered` gives it, where it will be.
        num_classes: Of the model.
        wanted: What that is.
        pixels: What it is computed from, and so must stay.
    """

    def __init__(self, name: str, columns: Tensor, num_classes: int, wanted: Wanted, pixels: Tensor) -> None:
        self._name, self._columns, self._pixels = name, columns, pixels
        self._num_classes, self._wanted = num_classes, wanted
        self._done: torch.cuda.Event | None = None
        if columns.is_cuda:
            self._columns = torch.empty(columns.shape, pin_memory=True)
            self._columns.copy_(columns, non_blocking=True)
            self._done = torch.cuda.Event(blocking=True)  # the thread that waits keeps no core busy
            self._done.record()

    def result(self) -> Found:
        """What was wanted, once it is there.

        Raises:
            EngineError: The model gives no numbers.
        """
        if self._done is not None:
            self._done.synchronize()
        if not self._columns.isfinite().all():
            raise EngineError(f"{self._name} gives numbers that are none; try another --precision")
        return Found(self._columns, self._num_classes, self._wanted)


class Runner:
    """Runs batches on one device.

    Args:
        models: The models by name.
        device: A torch device, or "auto".
        precision: "fp32", "bf16", "fp16", "fp8", or "auto".
        backend: What computes on the device; torch where nothing is said.

    Attributes:
        alone: Whoever works on the device from another thread than the one that computes holds it meanwhile.

    Raises:
        SettingsError: There is no such device, or the backend or precision that was asked for cannot be had.
    """

    def __init__(
        self,
        models: Mapping[str, LoadedModel],
        device: str = "auto",
        precision: str = "auto",
        backend: BackendOptions | None = None,
    ) -> None:
        self._device = device_of(device)
        options = backend or BackendOptions()
        options = replace(options, memory_bytes=options.memory_bytes // max(1, len(models)))
        self.alone = alone_on(str(self._device))
        with on(self._device):
            self._infos = {name: loaded.info for name, loaded in models.items()}
            self._backends = {
                name: choose_backend(loaded, self._device, precision, options, self.alone)
                for name, loaded in models.items()
            }

    @torch.inference_mode()
    def forward(self, key: BatchKey, prepared: Sequence[Prepared]) -> list[TopK | Vector]:
        """What the request of each image wants of the model's outputs under the key's schedule.

        Raises:
            EngineError: The model gives no numbers.
        """
        launched = prepared[0].batch.launched
        items = [each.item for each in prepared]
        if launched is None or not is_whole(prepared):
            launched = self.launch(key, rows(prepared), wanted_by(items))
        found = launched.result()
        return [found.of(row, item) for row, item in enumerate(items)]

    def top_k(
        self, key: BatchKey, pixels: Tensor, k: int, activation: Activation | None = None
    ) -> list[tuple[list[int], list[float]]]:
        """The k likeliest classes of each image, and their scores.

        Args:
            key: Model and schedule.
            pixels: (B, H, W, 3) in uint8, on the device.
            k: How many.
            activation: What makes scores of logits; the model's own where nothing is said.

        Raises:
            EngineError: The model gives no numbers.
        """
        wanted = Wanted((activation or self._infos[key.model].activation,), top_k=k)
        return self.launch(key, pixels, wanted).result().top_k()

    def run(self, key: BatchKey, pixels: Tensor) -> None:
        """Does all of the work of a batch, and keeps nothing of it; as `top_k`."""
        has_classes = bool(self._infos[key.model].labels)
        self.launch(key, pixels, Wanted(("none",), top_k=int(has_classes), features=not has_classes)).result()

    @torch.inference_mode()
    def launch(self, key: BatchKey, pixels: Tensor, wanted: Wanted) -> Launched:
        """Begins a batch. On a GPU that takes no time: it is computed after all that was launched before.

        The device must be done with the pixels.
        """
        backend, num_classes = self._backends[key.model], len(self._infos[key.model].labels)
        with on(self._device):
            columns = gathered(backend.outputs(pixels, key.schedule), num_classes, wanted)
            return Launched(f"{key.model} in {backend.info.precision}", columns, num_classes, wanted, pixels)

    def is_quick(self, key: BatchKey, num_images: int) -> bool:
        """Whether `launch` only begins what the device does then, in no time."""
        return self._backends[key.model].is_quick(num_images, key.schedule)

    def backend(self, model: str) -> BackendInfo:
        """What computes a model's answers here, and why."""
        return self._backends[model].info

    def computed_by(self, key: BatchKey) -> ComputedBy:
        """What computes a batch of this key now; right after a batch, what computed it."""
        return self._backends[key.model].computed_by(key.schedule)

    def compile_later(self, model: str, schedules: Sequence[Schedule], compiled: Callable[[Schedule], None]) -> None:
        """Has schedules of a model compiled in the background, where it must be compiled; as of `Backend`."""
        self._backends[model].compile_later(schedules, compiled)

    def compiles(self, model: str) -> bool:
        """Whether a model's schedules are compiled before they are as fast as they can be."""
        return self._backends[model].info.name == "openvino"

    def close(self) -> None:
        """Ends what is done in the background."""
        for backend in self._backends.values():
            backend.close()

    def compiling(self, model: str) -> Compiling | None:
        """What is compiled of a model in the background; None while nothing is."""
        return self._backends[model].compiling()

    def merged(self, model: str) -> MergedViT:
        """A model as torch computes it here, from pixels: to follow tokens, or to do without recordings."""
        return self._backends[model].merged

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    def check(self) -> None:
        """Raises when the device is broken."""
        check(self._device)

    def warm_up(self, key: BatchKey, is_likely: bool = True) -> None:
        """Compiles where that is needed, and computes one black image: no request pays for what is done once.

        Args:
            key: Model and schedule.
            is_likely: It is asked for at once.

        Raises:
            EngineError: That fails: what a start cannot do, no request can.
        """
        start = time.perf_counter()
        backend = self._backends[key.model]
        try:
            with on(self._device):
                backend.warm_up(key.schedule, is_likely)
            self.run(key, torch.zeros(1, *key.input_size, 3, dtype=torch.uint8, device=self._device))
        except (ServerError, SettingsError):
            raise
        except Exception as error:
            logger.debug("%s cannot be warmed up", key.model, exc_info=True)
            raise EngineError(f"{key.model} cannot compute a black image: {sentence(error)}") from error
        took_s, r = time.perf_counter() - start, text_of(r_of(key.schedule))
        logger.debug(
            "%s at r=%s is warm on %s in %s (%.2f s)", key.model, r, self._device, backend.info.precision, took_s
        )

    def warm_further(self) -> bool:
        """Does one piece more of what makes later batches faster; False where nothing is left."""
        with on(self._device):
            return any(backend.warm_further() for backend in self._backends.values())


@functools.cache
def alone_on(device: str) -> AbstractContextManager[bool]:
    """A lock for each device, whichever runner works there. A thread that holds it may take it again."""
    return threading.RLock()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one of this thread: Triton's kernels and CUDA graphs run there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check(device: torch.device) -> None:
    """Does the simplest work there is; raises when the device is broken for good, as after an illegal access."""
    torch.ones(1, device=device).sum().item()


def device_of(device: str) -> torch.device:
    """The torch device of a setting.

    Raises:
        SettingsError: There is no such device, or there are several.
    """
    if "," in device:
        raise SettingsError(f"device {device!r}: one device computes here; 'tome-server serve' takes several")
    try:
        found = torch.device(pick_device(device))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it has not
        raise SettingsError(f"device {device!r}: {error}") from error
    return found


def pick_device(device: str) -> str:
    """The device that "auto" stands for."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
