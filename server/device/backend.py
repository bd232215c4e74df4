"""The protocol of a backend, which computes a model's outputs on the device, and its options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from server.dial import Schedule
from server.memory import available_bytes
from server.types import BackendInfo, Compiling, ComputedBy
from tome_core import MergedViT


class Backend(Protocol):
    """Computes one model's outputs: logits and pooled features, side by side.

    Attributes:
        info: Its name, precision, and why it was chosen.
        merged: The model as torch computes it, on the device, from pixels.
    """

    info: BackendInfo
    merged: MergedViT

    def outputs(self, pixels: Tensor, schedule: Schedule) -> Tensor:
        """Pixels (B, H, W, 3) in uint8, on the device, to logits and pooled features, (B, K + C)."""
        ...

    def warm_up(self, schedule: Schedule, is_likely: bool = True) -> None:
        """Does the one-time work for a schedule; only a part of it if the schedule is unlikely to be requested soon."""
        ...

    def is_quick(self, num_images: int, schedule: Schedule) -> bool:
        """Whether `outputs` of such a batch only launches work of the device, and so returns at once."""
        ...

    def computed_by(self, schedule: Schedule) -> ComputedBy:
        """The backend that would compute a batch of this schedule now; right after `outputs`, the one that did."""
        ...

    def compile_later(self, schedules: Sequence[Schedule], compiled: Callable[[Schedule], None]) -> None:
        """Compiles schedules in the background, in this order; does nothing if the backend compiles none.

        Args:
            schedules: The schedules of `auto` or of the curve.
            compiled: Called after each compiled schedule, on the thread that compiles.
        """
        ...

    def compiling(self) -> Compiling | None:
        """The progress of the background compilation; None without one. Thread-safe."""
        ...

    def close(self) -> None:
        """Ends the background work."""
        ...

    def warm_further(self) -> bool:
        """Does one piece of the work that `warm_up` left, while the device is idle; returns False if none is left."""
        ...


@dataclass(frozen=True)
class BackendOptions:
    """The settings of backends.

    Attributes:
        name: "torch", "openvino", or "auto": OpenVINO on the CPU if it is installed and supports the model.
        threads: CPU threads; 0 takes all that the container may use.
        cache_dir: The folder that keeps translated models; None keeps none.
        max_batch_size: Most images in a batch.
        beside: Whether other models compute while this one is made ready.
        in_background: Whether `compile_later` follows. Then warm-up compiles for a single image only.
        memory_bytes: Most memory of graphs that are compiled while the server runs; by default a quarter of the
            memory that the container may use. The models share it.
    """

    name: str = "torch"
    threads: int = 0
    cache_dir: Path | None = None
    max_batch_size: int = 32
    beside: bool = False
    in_background: bool = False
    memory_bytes: int = field(default_factory=lambda: available_bytes() // 4)
