"""The choice of a backend: torch anywhere; OpenVINO on the CPU, if it is installed and supports the model."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

import torch

from server.device.backend import Backend, BackendOptions
from server.device.models import LoadedModel
from server.device.torch_backend import RecordedBackend, TorchBackend
from server.errors import SettingsError
from tome_core.recorded import CudaRecorder

logger = logging.getLogger(__name__)


def choose_backend(
    loaded: LoadedModel,
    device: torch.device,
    precision: str,
    options: BackendOptions,
    alone: AbstractContextManager[bool],
) -> Backend:
    """The backend for a model. Its info and the log have the reason.

    Args:
        loaded: The model; its weights are moved to the device, in the backend's dtype.
        device: The device.
        precision: "fp32", "bf16", "fp16", "fp8" or "auto".
        options: The settings for backends.
        alone: Held while something is recorded.

    Raises:
        SettingsError: OpenVINO or fp8 was requested, and is not available here; the message says why.
    """
    refusal = "asked for" if options.name == "torch" else _refusal(device, precision)
    if refusal is None:
        from server.device.openvino import OpenVINOBackend

        try:
            return _logged(loaded, OpenVINOBackend(loaded, precision, options))
        except Exception as error:  # any error of the converter; torch computes the model instead
            refusal = f"OpenVINO does not take the model: {error}".splitlines()[0]
            logger.debug("OpenVINO does not take %s", loaded.info.name, exc_info=error)
    if options.name == "openvino":
        raise SettingsError(f"--backend openvino: {refusal}")
    launched = TorchBackend(loaded, device, precision, refusal)
    if device.type != "cuda":
        return _logged(loaded, launched)
    return _logged(loaded, RecordedBackend(launched, options.max_batch_size, CudaRecorder(), alone))


def _refusal(device: torch.device, precision: str) -> str | None:
    """The reason why OpenVINO cannot be used, before it is tried. It is imported only on a CPU."""
    if device.type != "cpu":
        return f"OpenVINO is used on the CPU, not on {device.type}"
    if precision in ("fp16", "fp8"):
        return f"OpenVINO has no {precision} on CPUs here; it has fp32 and bf16"
    try:
        from tome_core.quiet import openvino  # noqa: F401
    except ImportError:
        return "the package openvino is not installed; install it with: pip install 'tome-server[openvino]'"
    return None


def _logged(loaded: LoadedModel, backend: Backend) -> Backend:
    info = backend.info
    logger.debug("%s runs on %s in %s: %s", loaded.info.name, info.name, info.precision, info.reason)
    return backend
