"""The groups of merged patches after every block of an image. Called from the device's thread."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from server.device.models import LoadedModel
from server.device.prepared import Prepared, rows
from server.device.runner import Runner, on
from server.errors import InvalidError
from server.ipc.messages import Merges, TopK
from server.types import BatchKey, ComputedBy
from tome_core import MergedViT
from tome_core.visualize import groups, sources


class Explainer:
    """Explains by torch in float32 on the model's own weights, independent of the backend of the service.

    Make it before the runner, which may move the models to another device or precision.

    Args:
        models: The models by name.
        device: A torch device, or "auto".

    Raises:
        SettingsError: There is no such device.
    """

    def __init__(self, models: Mapping[str, LoadedModel], device: str = "auto") -> None:
        self._models = {name: replace(loaded, merged=_sharing(loaded.merged)) for name, loaded in models.items()}
        self._runner = Runner(self._models, device, "fp32")

    def computed_by(self, key: BatchKey) -> ComputedBy:
        """The backend that computes the explanation."""
        return self._runner.computed_by(key)

    @torch.inference_mode()
    def explain(self, key: BatchKey, prepared: Sequence[Prepared]) -> list[Merges]:
        """Classifies images under the key's schedule, and finds what merged in each.

        Raises:
            InvalidError: The model's patches are not a grid of squares.
        """
        loaded = self._models[key.model]
        grid, patch = patches(loaded)
        with on(self._runner.device):
            found = sources(self._runner.merged(key.model), rows(prepared), key.schedule, range(loaded.info.num_blocks))
        after = torch.stack([groups(source[:, loaded.info.num_prefix_tokens :]) for source in found], dim=1)
        answers = self._runner.forward(key, prepared)
        return [
            Merges(top_k, grid, patch, each)
            for top_k, each in zip(answers, after.tolist(), strict=True)
            if isinstance(top_k, TopK)
        ]


def patches(loaded: LoadedModel) -> tuple[tuple[int, int], int]:
    """The grid of patches, rows and columns, and the side of a patch in pixels.

    Raises:
        InvalidError: They are not a grid of squares, and so cannot be drawn.
    """
    model: Any = loaded.merged.model
    height, width = loaded.info.preprocessing.input_size
    rows, columns = loaded.merged.family.grid(model, (height, width))
    patch = int(model.feature_info[-1]["reduction"])  # timm's name for it, in every family
    if (rows, columns) != (height // patch, width // patch):
        raise InvalidError(
            f"model {loaded.info.name}: its {rows} x {columns} patches cannot be painted as squares of {patch} px"
        )
    return (rows, columns), patch


def _sharing(merged: MergedViT) -> MergedViT:
    """A copy that shares the weights in memory, until one of the two is moved or cast."""
    weights: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in merged.parameters()
    }
    weights |= {id(buffer): buffer.detach() for buffer in merged.buffers()}
    return copy.deepcopy(merged, weights)
