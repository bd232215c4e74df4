"""The commands of `tome-server`, one file each. They import their modules when they run, so that `--help` is quick."""

from __future__ import annotations

import argparse
from typing import Protocol

from server.settings import Settings


class Command(Protocol):
    """The protocol of a command's file.

    Attributes:
        HELP: The command's purpose, in a line.
        SETTINGS: Names of the settings that it takes as flags.
    """

    HELP: str
    SETTINGS: tuple[str, ...]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the arguments that are not settings."""
        ...

    def run(self, settings: Settings, args: argparse.Namespace) -> int:
        """Runs the command; returns the exit status."""
        ...
