"""What stands in for CUDA graphs where there is no GPU."""

from __future__ import annotations

from typing import Any

import torch


class Calls:
    """A recorder that notes what it records, and computes it anew at every replay."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def __call__(self, compute: Any) -> Any:
        self.shapes.append(compute().shape)
        return Replayed(compute)


class Replayed:
    def __init__(self, compute: Any) -> None:
        self._compute, self.output = compute, compute()

    def replay(self) -> None:
        self.output.copy_(self._compute())


class Event:
    def wait(self) -> None: ...
    def record(self) -> None: ...
