"""`tome-server serve`: run the server."""

from __future__ import annotations

import argparse

from server.settings import Settings

HELP = "run the server"
SETTINGS: tuple[str, ...] = tuple(Settings.model_fields)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs the server. Every flag is a TOME_* variable (TOME_MAX_BATCH_SIZE=64) and a key of the YAML "
        "file too; a flag wins over a variable, a variable over the file."
    )


def run(settings: Settings, args: argparse.Namespace) -> int:
    from server.supervisor import serve

    return serve(settings)
