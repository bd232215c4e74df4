"""Backends: what computes logits on the device. torch anywhere; OpenVINO on the CPU, where it is installed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from server.device.models import LoadedModel
from server.device.torch_backend import RecordedBackend, TorchBackend
from server.dial import Schedule
from server.settings import SettingsError
from server.types import BackendInfo
from tome_core import MergedViT
from tome_core.recorded import CudaRecorder

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """What computes one model's logits.

    Attributes:
        info: Its name, precision, and why it was chosen.
        merged: The model as torch computes it, on the device, from pixels.
    """

    info: BackendInfo
    merged: MergedViT

    def logits(self, pixels: Tensor, schedule: Schedule) -> Tensor:
        """Pixels (B, H, W, 3) in uint8, on the device, to logits (B, K)."""
        ...

    def warm_up(self, schedule: Schedule) -> None:
        """Does what is done once for a schedule, as far as its first batches need it."""
        ...

    def is_quick(self, num_images: int, schedule: Schedule) -> bool:
        """Whether `logits` of such a batch only begins what the device does then, in no time."""
        ...

    def warm_further(self) -> bool:
        """Does one piece more of that, while there is nothing else to do; False where nothing is left."""
        ...


@dataclass(frozen=True)
class BackendOptions:
    """What the settings say of backends.

    Attributes:
        name: "torch", "openvino", or "auto": OpenVINO on the CPU where it is installed and takes the model.
        threads: CPU threads; 0 takes what the container may use.
        cache_dir: Where compiled models are kept; None keeps none.
        max_batch_size: Most images in a batch.
    """

    name: str = "torch"
    threads: int = 0
    cache_dir: Path | None = None
    max_batch_size: int = 32


def choose_backend(loaded: LoadedModel, device: torch.device, precision: str, options: BackendOptions) -> Backend:
    """The backend for a model, with the reason in its info and in the log.

    Args:
        loaded: The model; its weights are moved to the device, in the backend's dtype.
        device: Where it runs.
        precision: "fp32", "bf16", "fp16", "fp8" or "auto".
        options: What was asked for.

    Raises:
        SettingsError: OpenVINO or fp8 was asked for, and cannot be had here; the message says why.
    """
    refusal = _refusal(device, precision)
    if options.name != "torch" and refusal is None:
        from server.device.openvino import OpenVINOBackend

        try:
            return _told(loaded, OpenVINOBackend(loaded, precision, options))
        except Exception as error:  # whatever the converter raises: torch can do without it
            refusal = f"OpenVINO does not take the model: {error}".splitlines()[0]
            logger.debug("OpenVINO does not take %s", loaded.info.name, exc_info=error)
    if options.name == "openvino":
        raise SettingsError(f"--backend openvino: {refusal}")
    reason = "asked for" if options.name == "torch" else str(refusal)
    launched = TorchBackend(loaded, device, precision, reason)
    if device.type != "cuda":
        return _told(loaded, launched)
    return _told(loaded, RecordedBackend(launched, options.max_batch_size, CudaRecorder()))


def _refusal(device: torch.device, precision: str) -> str | None:
    """Why OpenVINO cannot be used, before anything of it is tried."""
    if device.type != "cpu":
        return f"OpenVINO is used on the CPU, not on {device.type}"
    if precision in ("fp16", "fp8"):
        return f"OpenVINO has no {precision} on CPUs here; it has fp32 and bf16"
    try:
        import openvino  # noqa: F401
    except ImportError:
        return "the package openvino is not installed; install it with: pip install 'tome-server[openvino]'"
    return None


def _told(loaded: LoadedModel, backend: Backend) -> Backend:
    info = backend.info
    logger.info("%s runs on %s in %s: %s", loaded.info.name, info.name, info.precision, info.reason)
    return backend
