"""The request for every file, its answer, and the protocol of a model that answers. Imports no torch."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.dial import Schedule
from server.ipc.messages import Classify, Embed, TopK, Vector
from server.types import ModelInfo

Ask = Classify | Embed
"""The request for every image: without images, with a schedule as `r`."""

Answer = TopK | Vector | str
"""The answer for one file; a string is its error."""


def schedule_of(ask: Ask) -> Schedule:
    """The `r` of each block."""
    assert isinstance(ask.r, tuple), "it is no request of a client"
    return ask.r


@dataclass(frozen=True)
class Served:
    """A loaded model.

    Attributes:
        info: Its description.
        weights: sha256 of its weights file; None for random weights.
        tuned: sha256 of the file of its tuned numbers; None without.
    """

    info: ModelInfo
    weights: str | None
    tuned: str | None


class Computes(Protocol):
    """One device or several, with a model.

    Attributes:
        served: The model.
    """

    served: Served

    def warm_up(self, ask: Ask) -> None:
        """Compiles or records for a request, once; raises EngineError if the model gives no numbers."""
        ...

    def answers(self, ask: Ask, batches: Iterable[Sequence[str]]) -> Generator[list[Answer], None, None]:
        """Yields the answers to each batch of files, in order. It reads some batches ahead.

        Raises:
            EngineError: A device is broken, or no image of a batch can be computed.
            UnavailableError: Decoder processes cannot be started.
        """
        ...

    def close(self) -> None:
        """Ends threads and processes."""
        ...
