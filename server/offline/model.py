"""What is asked of every file, what is answered, and what answers: in words that need no torch."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.dial import Schedule
from server.ipc.messages import Classify, Embed, TopK, Vector
from server.types import ModelInfo

Ask = Classify | Embed
"""What is asked of every image: a request without images, whose `r` is a schedule."""

Answer = TopK | Vector | str
"""Of one file; text says what is wrong with it."""


def schedule_of(ask: Ask) -> Schedule:
    """The `r` of each block."""
    assert isinstance(ask.r, tuple), "it is no request of a client"
    return ask.r


@dataclass(frozen=True)
class Served:
    """A model as it is loaded.

    Attributes:
        info: What it is.
        weights: sha256 of their file; None for random ones.
        tuned: sha256 of the file of its tuned numbers; None where it has none.
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
        """Does what is done once for what is asked; raises EngineError where the model gives no numbers."""
        ...

    def answers(self, ask: Ask, batches: Iterable[Sequence[str]]) -> Generator[list[Answer], None, None]:
        """The answers to each batch of files, in order. It takes some batches more than it has given.

        Raises:
            EngineError: A device is broken, or no image of a batch can be computed.
            UnavailableError: Decoder processes cannot be started.
        """
        ...

    def close(self) -> None:
        """Ends what was started."""
        ...
