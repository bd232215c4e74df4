"""The HTTP side's view of an engine: in this process, or behind a local socket."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Protocol, TypeVar

from server.curve import Curve
from server.dial import RSetting
from server.ipc.messages import Answered, Request
from server.types import Compiling, Configuration, ModelInfo, ModelState

T = TypeVar("T")


class Engine(Protocol):
    """Answers requests and keeps the deployment's `r`."""

    def catalog(self) -> dict[str, ModelInfo]:
        """The loaded models by name, the default first. Raises UnavailableError before they are known."""
        ...

    def answer(self, request: Request[T]) -> Awaitable[Answered[T]]:
        """Answers every image of a request, or raises a ServerError. Cancelling the call withdraws the request."""
        ...

    async def curve(self, model: str) -> Curve:
        """The model's curve with the present speeds. Raises NotFoundError if it has none."""
        ...

    async def compiling(self, model: str) -> Compiling | None:
        """Which of the model's schedules are being compiled; None where none is."""
        ...

    async def configuration(self) -> Configuration:
        """The deployment `r` of every model at this moment."""
        ...

    async def configure(self, changes: Mapping[str, RSetting], expected_version: int | None) -> Configuration:
        """Changes the deployment `r` of some models, all or none, from the next request on.

        Raises:
            NotFoundError: There is no such model.
            InvalidError: A model cannot merge by its `r`.
            ConflictError: The version is no longer the expected one.
            UnavailableError: The store of a shared configuration does not answer.
        """
        ...

    async def load(self, name: str, version: str | None = None) -> None:
        """Loads a model beside the others and puts it into service. A model of the same name is replaced in one step.

        Args:
            name: A model that was named at the start, or one of the repository.
            version: One of its versions; None takes the newest.

        Raises:
            NotFoundError: There is no such model to load.
            InvalidError: There is no such version, or it cannot be loaded.
            EngineError: It is loaded but cannot compute on this device.
            ConflictError: This engine loads no models at run time.
        """
        ...

    async def unload(self, name: str) -> None:
        """Takes a model out of service. Its present requests are answered, then its memory is freed.

        Raises:
            NotFoundError: There is no such model.
            ConflictError: This engine unloads no models at run time.
        """
        ...

    async def repository(self) -> list[ModelState]:
        """The models that are loaded, and those that may be."""
        ...

    async def check(self) -> None:
        """Returns once the batch loop and the device have answered; raises UnavailableError if they do not."""
        ...
