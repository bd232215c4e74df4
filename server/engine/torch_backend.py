"""torch as the backend: any device, any schedule at once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from server.dial import Schedule
from server.engine.graphs import Graphs, Record
from server.types import BackendInfo
from tome_core import MergedViT

CPU_PART = 16
"""Images that a CPU computes at a time: more do not fit its caches, and 32 at once take a fifth longer."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchBackend:
    """Runs the merging model as it is.

    Args:
        merged: The model; it is moved to the device.
        device: A torch device.
        precision: "fp32", "bf16", "fp16", or "auto": bf16 on cuda, fp32 elsewhere.
        reason: Why it was chosen.

    Attributes:
        info: What it is.
        dtype: The model's.
        merged: The model on its device.
    """

    def __init__(self, merged: MergedViT, device: torch.device, precision: str = "auto", reason: str = "") -> None:
        if precision == "auto":
            precision = "bf16" if device.type == "cuda" else "fp32"
        self.info = BackendInfo("torch", precision, reason)
        self.dtype = _DTYPES[precision]
        self.merged = merged.to(device, self.dtype).eval()
        self._part = CPU_PART if device.type == "cpu" else None

    def logits(self, images: Tensor, schedule: Schedule) -> Tensor:
        """Normalised images (B, 3, H, W) to logits (B, K)."""
        parts = images.split(self._part or len(images))
        return torch.cat([self.merged(part, schedule) for part in parts])

    def warm_up(self, schedule: Schedule) -> None:
        """Nothing: torch warms up by running."""


class RecordedBackend:
    """torch by recorded forward passes: on a GPU small batches are bound by launches, which a CUDA graph has not.

    Args:
        backend: What is recorded.
        input_size: Height and width of its images.
        device: Where it runs.
        max_batch_size: Most images in a batch.
        record: Makes a recording.

    Attributes:
        info: What it is.
        dtype: The model's.
    """

    def __init__(
        self,
        backend: TorchBackend,
        input_size: tuple[int, int],
        device: torch.device,
        max_batch_size: int,
        record: Record,
    ) -> None:
        self.dtype = backend.dtype
        image = torch.zeros(3, *input_size, dtype=self.dtype, device=device)
        self._graphs = Graphs(backend.logits, image, max_batch_size, record)
        with torch.inference_mode():
            implementation = backend.merged.implementation(image[None])
        reason = f"{implementation.name} operations ({implementation.reason}), recorded as graphs"
        self.info = replace(backend.info, reason=f"{backend.info.reason}; {reason}")

    def logits(self, images: Tensor, schedule: Schedule) -> Tensor:
        """Normalised images (B, 3, H, W) to logits (B, K)."""
        return self._graphs(images, schedule)

    @torch.inference_mode()
    def warm_up(self, schedule: Schedule) -> None:
        """Records the schedule at every batch size."""
        self._graphs.warm_up(schedule)


def set_threads(threads: int) -> None:
    """Gives torch that many CPU threads; 0 leaves the choice to it."""
    if threads:
        torch.set_num_threads(threads)
