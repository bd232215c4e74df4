"""The commands of `tome-server`, one file each; what they load, they load when they run, so that `--help` is quick."""

from __future__ import annotations

import argparse
from typing import Protocol

from server.settings import Settings


class Command(Protocol):
    """What a command's file offers.

    Attributes:
        HELP: What it does, in a line.
        SETTINGS: Names of the settings that it takes as flags.
    """

    HELP: str
    SETTINGS: tuple[str, ...]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the arguments that are not settings."""
        ...

    def run(self, settings: Settings, args: argparse.Namespace) -> int:
        """Runs it; gives the exit status."""
        ...
