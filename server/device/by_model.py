"""The models of an engine on one device, each of which comes and goes by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from server.device.device import Device, OnDevice, Timed
from server.device.runner import check
from server.ipc.messages import Item
from server.types import BatchKey, Compiling, ComputedBy, ModelInfo


class ByModel:
    """Has each batch prepared and computed by what its model has on the device.

    Models are added by any thread. They are removed by the one that computes, when none of their batches is under way.

    Args:
        device: Where all of them are.
        prepares: Batches are prepared by a stage of their own.

    Attributes:
        prepares: As given.
    """

    def __init__(self, device: torch.device, prepares: bool) -> None:
        self._device, self.prepares = device, prepares
        self._models: dict[tuple[str, str], Device] = {}  # replaced as a whole: two threads look into it

    def __len__(self) -> int:
        """Models in memory."""
        return len(self._models)

    def add(self, info: ModelInfo, device: Device) -> None:
        """Takes batches of a model from now on."""
        self._models = {**self._models, (info.name, info.revision): device}

    def remove(self, info: ModelInfo) -> None:
        """Drops a model, and with it its memory."""
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

    def begin(self, info: ModelInfo, on_device: OnDevice, timed: Timed) -> None:
        self._models[info.name, info.revision].begin(on_device, timed)

    def close(self) -> None:
        for device in self._models.values():
            device.close()

    def check(self) -> None:
        check(self._device)

    def warm_further(self) -> bool:
        return any(device.warm_further() for device in self._models.values())
