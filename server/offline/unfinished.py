"""An unfinished table: a folder beside the output, with a description and parts that are complete files.

A process that is killed loses only the rows of the last seconds. When all rows are written, the parts are joined, the
file moves to its place, and the folder is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.errors import SettingsError
from server.offline.formats import Format
from server.offline.rows import Row
from tome_core.whole_file import write_whole

SUFFIX = ".unfinished"
PART_S, PART_ROWS = 10.0, 1 << 13
"""Write a part after this many seconds or rows."""

_ABOUT = "about.json"


class Unfinished:
    """Opens the unfinished table of an output, or begins one.

    Args:
        output: Path of the finished table.
        form: Its format.
        columns: Its columns.
        about: Everything that decides the rows. Another run continues only with equal values.
        begins_anew: Whether to discard a table with other values.

    Attributes:
        done: Files that already have a row.

    Raises:
        SettingsError: It has other values, another process writes it, or it cannot be read or written.
    """

    def __init__(
        self, output: Path, form: Format, columns: Sequence[str], about: Mapping[str, Any], begins_anew: bool
    ) -> None:
        self._output, self._form, self._columns = output, form, columns
        self.folder = output.with_name(output.name + SUFFIX)
        self._rows: list[Row] = []
        self._since = time.monotonic()
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = _locked(self.folder)
        except OSError as error:
            raise SettingsError(f"{self.folder}: {error.strerror or error}") from None
        try:
            self._take_up(about, begins_anew)
            self.done = {file for part in self._parts() for file in form.files(part)}
        except SettingsError:
            self.close()
            raise
        # # KeyError and TypeError: JSON or CSV with other contents
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.close()
            raise SettingsError(f"{self.folder} cannot be read ({error}); remove it to begin anew") from None

    def add(self, rows: Sequence[Row]) -> None:
        """Adds rows. They stay in memory until the next part is written.

        Raises:
            SettingsError: The part cannot be written.
        """
        self._rows += rows
        if len(self._rows) >= PART_ROWS or time.monotonic() - self._since >= PART_S:
            self.keep()

    def keep(self) -> None:
        """Writes the rows in memory as a part.

        Raises:
            SettingsError: It cannot be written.
        """
        if self._rows:
            number = max((int(part.stem) for part in self._parts()), default=0) + 1
            try:
                part = self._form.part(self._rows, self._columns)
                write_whole(self.folder / f"{number:08}{self._output.suffix}", part)
            except OSError as error:
                raise SettingsError(f"{self.folder}: {error.strerror or error}") from None
        self._rows, self._since = [], time.monotonic()

    def finish(self) -> None:
        """Writes the finished table to its place.

        Raises:
            SettingsError: It cannot be written; the parts stay.
        """
        self.keep()
        joined = self.folder / "joined"
        try:
            self._form.join(self._parts(), joined, self._columns)
            joined.replace(self._output)
        except OSError as error:
            raise SettingsError(f"{self._output}: {error.strerror or error}; {self.folder} keeps all rows") from None
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Releases the folder for other processes."""
        os.close(self._lock)

    def _parts(self) -> list[Path]:
        """The parts in the order of writing."""
        found = self.folder.glob(f"*{self._output.suffix}")
        return sorted(part for part in found if part.stem.isdecimal())

    def _take_up(self, about: Mapping[str, Any], begins_anew: bool) -> None:
        """Continues the existing table; discards one with other values if `begins_anew`."""
        file = self.folder / _ABOUT
        said = dict(json.loads(file.read_bytes())) if file.exists() else about
        if said != about and not begins_anew:
            raise SettingsError(self._differs(said, about))
        if said != about:
            for part in self._parts():
                part.unlink()
        write_whole(file, json.dumps(about).encode())

    def _differs(self, said: Mapping[str, Any], about: Mapping[str, Any]) -> str:
        name = next(name for name in {**said, **about} if said.get(name) != about.get(name))
        return (
            f"{self.folder} was begun with {name} {_short(said.get(name))}, and this run has "
            f"{_short(about.get(name))}; take the same settings, another -o, or --overwrite to begin anew"
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _locked(folder: Path) -> int:
    """A descriptor that locks the folder for this process; the system unlocks it when the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise SettingsError(f"another process writes {folder}") from None
    return descriptor
