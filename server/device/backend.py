"""What computes a model's outputs on the device, as the runner sees it, and what may be said of it."""

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
    """What computes one model's outputs: logits and pooled features, side by side.

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
        """Does what is done once for a schedule; where it is not likely to be asked for soon, a part of that."""
        ...

    def is_quick(self, num_images: int, schedule: Schedule) -> bool:
        """Whether `outputs` of such a batch only begins what the device does then, in no time."""
        ...

    def computed_by(self, schedule: Schedule) -> ComputedBy:
        """What computes a batch of this schedule now; right after `outputs`, what computed it. Any thread may ask."""
        ...

    def compile_later(self, schedules: Sequence[Schedule], compiled: Callable[[Schedule], None]) -> None:
        """Has schedules compiled in the background, in this order; nothing where any schedule runs as it is.

        Args:
            schedules: Those that `auto` and the curve have.
            compiled: Is called after each schedule that was compiled, on the thread that compiles.
        """
        ...

    def compiling(self) -> Compiling | None:
        """What is compiled in the background; None while nothing is. Any thread may ask."""
        ...

    def close(self) -> None:
        """Ends what is done in the background."""
        ...

    def warm_further(self) -> bool:
        """Does one piece of what `warm_up` left, while there is nothing else to do; False where nothing is left."""
        ...


@dataclass(frozen=True)
class BackendOptions:
    """What the settings say of backends.

    Attributes:
        name: "torch", "openvino", or "auto": OpenVINO on the CPU where it is installed and takes the model.
        threads: CPU threads; 0 takes what the container may use.
        cache_dir: Where compiled models are kept; None keeps none.
        max_batch_size: Most images in a batch.
        beside: Other models compute while this one is made ready.
        in_background: `compile_later` will come: what is warmed is compiled for a lone image until then.
        memory_bytes: What graphs may take that are compiled while the server runs; a quarter of the memory that the
            container may use. Its models share it.
    """

    name: str = "torch"
    threads: int = 0
    cache_dir: Path | None = None
    max_batch_size: int = 32
    beside: bool = False
    in_background: bool = False
    memory_bytes: int = field(default_factory=lambda: available_bytes() // 4)
