"""How a long command is asked to stop and keep what it has."""

from __future__ import annotations

import signal
from typing import Self

from server.commands.output import tell


class Stop:
    """Within it, the first Ctrl-C or SIGTERM asks to stop; the next one ends the process as ever.

    Args:
        message: What is told then.

    Attributes:
        number: The signal that asked; None before.
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
