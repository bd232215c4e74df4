"""The models of an engine on one device. Each is added and removed by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from server.device.device import Device
from server.device.runner import check
from server.ipc.messages import Item
from server.types import BatchKey, Compiling, ComputedBy, ModelInfo, OnDevice, OnTimed


class ByModel:
    """Passes each batch to the `Device` of its model.

    Any thread may add models. Only the thread that computes removes them, when none of their batches is under way.

    Args:
        device: The device of all models.
        prepares: Whether batches are prepared in a separate stage.

    Attributes:
        prepares: As given.
    """

    def __init__(self, device: torch.device, prepares: bool) -> None:
        self._device, self.prepares = device, prepares
        self._models: dict[tuple[str, str], Device] = {}  # replaced as a whole, because several threads read it

    def __len__(self) -> int:
        """Models in memory."""
        return len(self._models)

    def add(self, info: ModelInfo, device: Device) -> None:
        """Adds a model, whose batches are taken from now on."""
        self._models = {**self._models, (info.name, info.revision): device}

    def remove(self, info: ModelInfo) -> None:
        """Removes a model and frees its memory."""
        if (device := self._models.get((info.name, info.revision))) is not None:
            device.close()
        self._models = {key: each for key, each in self._models.items() if key != (info.name, info.revision)}

    def prepare(self, key: BatchKey, items: Sequence[Item]) -> Sequence[Any]:
        return self._models[key.model, key.revision].prepare(key, items)

    def compute(self, key: BatchKey, work: Sequence[Any]) -> Sequence[Any]:
        return self._models[key.model, key.revision].compute(key, work)

    def computed_by(self, key: BatchKey) -> ComputedBy:
        return self._models[key.model, key.revision].computed_by(key)

    def compiling(self, info: ModelInfo) -> Compiling | None:
        return self._models[info.name, info.revision].compiling(info.name)

    def begin(self, info: ModelInfo, on_device: OnDevice, timed: OnTimed) -> None:
        self._models[info.name, info.revision].begin(on_device, timed)

    def close(self) -> None:
        for device in self._models.values():
            device.close()

    def check(self) -> None:
        check(self._device)

    def warm_further(self) -> bool:
        return any(device.warm_further() for device in self._models.values())
