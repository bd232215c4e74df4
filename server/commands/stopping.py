"""The request to a long command to stop and keep its results."""

from __future__ import annotations

import signal
from typing import Self

from server.commands.output import tell


class Stop:
    """Inside, the first Ctrl-C or SIGTERM requests a stop; the next one ends the process as usual.

    Args:
        message: Printed at the request.

    Attributes:
        number: The signal of the request; None before it.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        self.number: int | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.is_asked

    @property
    def is_asked(self) -> bool:
        return self.number is not None

    def _ask(self, number: int, frame: object) -> None:
        self.number = number
        self.__exit__()
        tell(f"\n{self._message}")
