"""torch as the backend: any device, any schedule without preparation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from server.cpus import available_cpus
from server.device.graphs import Graphs, Record
from server.device.models import LoadedModel
from server.dial import Schedule
from server.errors import SettingsError
from server.types import BackendInfo, Compiling, ComputedBy
from tome_core import MergedViT, UnsupportedModelError

CPU_PART = 16
"""Images that a CPU computes at a time. More do not fit its caches: 32 at once take a fifth longer."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""Dtype of the model's weights; fp8 then multiplies most products of its blocks in float8."""


class _Uncompiled:
    """A backend that computes every schedule itself, and does nothing in the background."""

    info: BackendInfo

    def computed_by(self, schedule: Schedule) -> ComputedBy:
        """This backend, for every schedule."""
        return ComputedBy(self.info.name, self.info.precision)

    def compile_later(self, schedules: Sequence[Schedule], compiled: Callable[[Schedule], None]) -> None:
        """Does nothing: every schedule runs uncompiled."""

    def compiling(self) -> Compiling | None:
        """Nothing is ever compiled."""
        return None

    def close(self) -> None:
        """Does nothing: no work is in the background."""


class TorchBackend(_Uncompiled):
    """Runs the merging model directly.

    Args:
        loaded: The model; its weights are moved to the device.
        device: A torch device.
        precision: "fp32", "bf16", "fp16", "fp8", or "auto": bf16 on cuda, fp32 elsewhere.
        reason: The reason for this choice.

    Attributes:
        info: Name, precision and reason.
        merged: The model on its device; it takes pixels, and returns features beside logits.
        black: A black input image, (H, W, 3) in uint8 on the device.
        implementation: Its implementation, and the reason.

    Raises:
        SettingsError: The model or the device has no fp8; the message says why.
    """

    def __init__(self, loaded: LoadedModel, device: torch.device, precision: str = "auto", reason: str = "") -> None:
        if precision == "auto":
            precision = "bf16" if device.type == "cuda" else "fp32"
        self.info = BackendInfo("torch", precision, reason)
        seen = loaded.info.preprocessing
        merged = loaded.merged.from_pixels(seen.mean, seen.std).with_features()
        self.merged = merged.to(device, _DTYPES[precision]).eval()
        self.black = torch.zeros(*seen.input_size, 3, dtype=torch.uint8, device=device)
        with torch.inference_mode():
            self.implementation = self.merged.implementation(self.black[None])
        if precision == "fp8":
            self.merged = self._in_float8(loaded.info.name)
        self._part = CPU_PART if device.type == "cpu" else None

    def outputs(self, pixels: Tensor, schedule: Schedule) -> Tensor:
        """Pixels (B, H, W, 3) in uint8 to logits and pooled features, (B, K + C)."""
        parts = pixels.split(self._part or len(pixels))
        return torch.cat([self.merged(part, schedule) for part in parts])

    def _in_float8(self, name: str) -> MergedViT:
        """The model in float8. Raises SettingsError if it is unavailable, because another precision must not replace
        it.
        """
        try:
            merged = self.merged.in_float8()
        except UnsupportedModelError as error:
            raise SettingsError(f"--precision fp8: model {name}: {error}") from error
        if self.implementation.name != "fused":  # the plain layers have no float8
            raise SettingsError(f"--precision fp8: model {name}: it does not run fused: {self.implementation.reason}")
        return merged

    def warm_up(self, schedule: Schedule, is_likely: bool = True) -> None:
        """Does nothing: torch warms up by running."""

    def is_quick(self, num_images: int, schedule: Schedule) -> bool:
        """Whether the launch of a batch takes no time: never."""
        return False

    def warm_further(self) -> bool:
        """False: no work is left."""
        return False


class RecordedBackend(_Uncompiled):
    """torch by recorded forward passes. On a GPU, small batches are bound by launches, which a CUDA graph avoids.

    Args:
        backend: The recorded backend.
        max_batch_size: Most images in a batch.
        record: Makes a recording.
        alone: Held while something is recorded.

    Attributes:
        info: Name, precision and reason.
        merged: The recorded model.
    """

    def __init__(
        self, backend: TorchBackend, max_batch_size: int, record: Record, alone: AbstractContextManager[bool]
    ) -> None:
        self.merged = backend.merged
        device = backend.black.device
        self._graphs = Graphs(backend.outputs, backend.black, max_batch_size, record, alone, lambda: has_room(device))
        reason = f"{backend.implementation.name} operations ({backend.implementation.reason}), recorded as graphs"
        self.info = replace(backend.info, reason=f"{backend.info.reason}; {reason}")

    def outputs(self, pixels: Tensor, schedule: Schedule) -> Tensor:
        """Pixels (B, H, W, 3) in uint8 to logits and pooled features, (B, K + C)."""
        return self._graphs(pixels, schedule)

    @torch.inference_mode()
    def warm_up(self, schedule: Schedule, is_likely: bool = True) -> None:
        """Records the schedule."""
        self._graphs.warm_up(schedule, is_likely)

    def is_quick(self, num_images: int, schedule: Schedule) -> bool:
        """Whether the launch of a batch takes no time, because it is recorded."""
        return self._graphs.has(num_images, schedule)

    @torch.inference_mode()
    def warm_further(self) -> bool:
        """Records one more batch size; returns False if all are recorded."""
        return self._graphs.record_next()


def has_room(device: torch.device) -> bool:
    """Whether a tenth of a GPU's memory is free, which large batches may need."""
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    return free >= total / 10


def set_threads(threads: int) -> None:
    """Sets the number of torch's CPU threads; 0 leaves torch's choice, limited to the CPUs that the container may use.

    Torch's own choice is the machine's cores, of which a container has a share. It is less than the number of CPUs if a
    core has two, so it is never raised.
    """
    if threads or torch.get_num_threads() > available_cpus():
        torch.set_num_threads(threads or available_cpus())


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread. With many small tensors the other threads only wait, which takes CPU time.

    Only for the start: a thread that uses torch for the first time meanwhile would always keep one thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
