"""torch as the backend: any device, any schedule at once."""

from __future__ import annotations

import torch
from torch import Tensor

from server.dial import Schedule
from server.types import BackendInfo
from tome_core import MergedViT

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
    """

    def __init__(self, merged: MergedViT, device: torch.device, precision: str = "auto", reason: str = "") -> None:
        if precision == "auto":
            precision = "bf16" if device.type == "cuda" else "fp32"
        self.info = BackendInfo("torch", precision, reason)
        self.dtype = _DTYPES[precision]
        self._merged = merged.to(device, self.dtype).eval()

    def logits(self, images: Tensor, schedule: Schedule) -> Tensor:
        """Normalised images (B, 3, H, W) to logits (B, K)."""
        logits: Tensor = self._merged(images, schedule)
        return logits

    def warm_up(self, schedule: Schedule) -> None:
        """Nothing: torch warms up by running."""


def set_threads(threads: int) -> None:
    """Gives torch that many CPU threads; 0 leaves the choice to it."""
    if threads:
        torch.set_num_threads(threads)
