"""The facts that a curve depends on, of a model as it is loaded here."""

from __future__ import annotations

from importlib.metadata import version

import torch

from server import __version__
from server.cpus import cpu_name
from server.curve import Facts
from server.device.models import LoadedModel
from server.device.runner import Runner


def facts_of(loaded: LoadedModel, runner: Runner) -> Facts | None:
    """What a curve of this model would depend on here; None for random weights, which have none.

    Args:
        loaded: The model.
        runner: The device that holds it.
    """
    weights = loaded.weights_sha256()
    if weights is None:
        return None
    backend, device = runner.backend(loaded.info.name), runner.device
    packages = dict.fromkeys(("torch", "timm", backend.name))
    return Facts(
        weights=weights,
        backend=backend.name,
        device=device_name(device),
        precision=backend.precision,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
        versions={"tome-server": __version__} | {name: version(name) for name in packages},
        tuned=loaded.tuned,
    )


def device_name(device: torch.device) -> str:
    """The processor as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()
