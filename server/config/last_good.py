"""The last good configuration, for a start whose source gives none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from server.config.files import read_file, replace_file
from server.errors import ServerError
from server.unnamed import UnnamedFile

logger = logging.getLogger(__name__)

T = TypeVar("T")


class LastGood:
    """Keeps one document in two places: in memory for an engine that restarts, in a file for a server that restarts.

    Args:
        memory: Outlives the engine process and any fault of the disk; None without a supervisor.
        file: Outlives the server; None if the server keeps no state.
        what: The log's name of the document.
    """

    def __init__(
        self, memory: UnnamedFile | None = None, file: Path | None = None, what: str = "the configuration"
    ) -> None:
        self._memory, self._file, self._what = memory, file, what
        self._problem: str | None = None

    def keep(self, line: str) -> None:
        """Keeps a document of one line. A file that cannot be written is logged once."""
        if self._memory is not None:
            self._memory.write(f"{line}\n".encode())
        if self._file is None or self._holds(self._file, line):
            return
        try:
            replace_file(self._file, line)
            self._problem = None
        except OSError as error:
            problem = f"{self._what} cannot be kept in {self._file} for the next start: {error.strerror}"
            if problem != self._problem:
                logger.warning("%s", problem)
            self._problem = problem

    @staticmethod
    def _holds(file: Path, line: str) -> bool:
        try:
            return read_file(file)[1] == line.encode()
        except (OSError, ServerError):
            return False

    def recall(self, read: Callable[[bytes], T]) -> T | None:
        """Returns the kept document as `read` parses it; None if there is none or `read` refuses it."""
        if self._memory is not None and (line := self._memory.read().partition(b"\n")[0]):
            try:
                return read(line)
            except ServerError as error:
                logger.warning("%s before the restart is not used: %s", self._what, error)
        if self._file is not None:
            try:
                return read(read_file(self._file)[1])
            except (FileNotFoundError, NotADirectoryError):
                pass  # nothing was kept yet
            except (OSError, ServerError) as error:
                logger.warning("%s, as %s keeps it, is not used: %s", self._what, self._file, error)
        return None
