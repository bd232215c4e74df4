"""Runs batches of pixels through loaded models on a device. Called from one thread."""

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
    """A batch that the device computes.

    Args:
        name: The model and its precision, for messages.
        columns: The requested columns of its outputs, as from `gathered`; filled later.
        num_classes: Number of the model's classes.
        wanted: The requested outputs.
        pixels: The input, which must stay in memory.
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
        """Waits for the requested columns and returns them.

        Raises:
            EngineError: The model's outputs are not finite.
        """
        if self._done is not None:
            self._done.synchronize()
        if not self._columns.isfinite().all():
            raise EngineError(f"{self._name} gives outputs that are not finite; try another --precision")
        return Found(self._columns, self._num_classes, self._wanted)


class Runner:
    """Runs batches on one device.

    Args:
        models: The models by name.
        device: A torch device, or "auto".
        precision: "fp32", "bf16", "fp16", "fp8", or "auto".
        backend: The options of the backend; None for their defaults.

    Attributes:
        alone: A lock. Threads other than the computing one hold it while they use the device.

    Raises:
        SettingsError: There is no such device, or the requested backend or precision is not available.
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
        """The requested columns of the model's outputs for each image, under the key's schedule.

        Raises:
            EngineError: The model's outputs are not finite.
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
            k: Number of classes.
            activation: Turns logits into scores; None for the model's own.

        Raises:
            EngineError: The model's outputs are not finite.
        """
        wanted = Wanted((activation or self._infos[key.model].activation,), top_k=k)
        return self.launch(key, pixels, wanted).result().top_k()

    def run(self, key: BatchKey, pixels: Tensor) -> None:
        """Computes a batch and discards its result; raises as `top_k`."""
        has_classes = bool(self._infos[key.model].labels)
        self.launch(key, pixels, Wanted(("none",), top_k=int(has_classes), features=not has_classes)).result()

    @torch.inference_mode()
    def launch(self, key: BatchKey, pixels: Tensor, wanted: Wanted) -> Launched:
        """Begins a batch. On a GPU this returns at once: the batch is computed after all that was launched before.

        The pixels must be complete on the device.
        """
        backend, num_classes = self._backends[key.model], len(self._infos[key.model].labels)
        with on(self._device):
            columns = gathered(backend.outputs(pixels, key.schedule), num_classes, wanted)
            return Launched(f"{key.model} in {backend.info.precision}", columns, num_classes, wanted, pixels)

    def is_quick(self, key: BatchKey, num_images: int) -> bool:
        """Whether `launch` only begins the work of the device, and so returns at once."""
        return self._backends[key.model].is_quick(num_images, key.schedule)

    def backend(self, model: str) -> BackendInfo:
        """The backend of a model, and the reason."""
        return self._backends[model].info

    def computed_by(self, key: BatchKey) -> ComputedBy:
        """The backend that would compute a batch of this key now; right after a batch, the one that did."""
        return self._backends[key.model].computed_by(key.schedule)

    def compile_later(self, model: str, schedules: Sequence[Schedule], compiled: Callable[[Schedule], None]) -> None:
        """Compiles schedules of a model in the background, if its backend compiles; see `Backend`."""
        self._backends[model].compile_later(schedules, compiled)

    def compiles(self, model: str) -> bool:
        """Whether a model's schedules must be compiled to run at full speed."""
        return self._backends[model].info.name == "openvino"

    def close(self) -> None:
        """Ends the background work."""
        for backend in self._backends.values():
            backend.close()

    def compiling(self, model: str) -> Compiling | None:
        """The progress of a model's background compilation; None without one."""
        return self._backends[model].compiling()

    def merged(self, model: str) -> MergedViT:
        """A model as torch computes it here, from pixels and without recordings: to follow tokens."""
        return self._backends[model].merged

    @property
    def device(self) -> torch.device:
        """The device."""
        return self._device

    def check(self) -> None:
        """Raises if the device is broken."""
        check(self._device)

    def warm_up(self, key: BatchKey, is_likely: bool = True) -> None:
        """Compiles if needed and computes one black image, so that no request pays for one-time work.

        Args:
            key: Model and schedule.
            is_likely: Whether requests will name it at once.

        Raises:
            EngineError: The image cannot be computed.
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
        """Does one more piece of work that makes later batches faster; returns False if none is left."""
        with on(self._device):
            return any(backend.warm_further() for backend in self._backends.values())


@functools.cache
def alone_on(device: str) -> AbstractContextManager[bool]:
    """The lock of a device, which all its runners share. A thread that holds it may take it again."""
    return threading.RLock()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one of this thread: Triton's kernels and CUDA graphs run there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check(device: torch.device) -> None:
    """Does very simple work; raises if the device is permanently broken, as after an illegal access."""
    torch.ones(1, device=device).sum().item()


def device_of(device: str) -> torch.device:
    """The torch device of a setting.

    Raises:
        SettingsError: There is no such device, or the setting names several.
    """
    if "," in device:
        raise SettingsError(f"device {device!r}: one device computes here; 'tome-server serve' takes several")
    try:
        found = torch.device(pick_device(device))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # torch's errors for a device that is not there
        raise SettingsError(f"device {device!r}: {error}") from error
    return found


def pick_device(device: str) -> str:
    """The device that "auto" stands for."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
