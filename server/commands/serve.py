"""`tome-server serve`: run the server."""

from __future__ import annotations

import argparse
import logging

from server.keys import KEYS
from server.settings import Settings

logger = logging.getLogger(__name__)

HELP = "run the server"
SETTINGS: tuple[str, ...] = tuple(Settings.model_fields)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs the server. Every flag is a TOME_* variable (TOME_MAX_BATCH_SIZE=64) and a key of the YAML "
        "file too; a flag wins over a variable, a variable over the file. A key on the command line is seen "
        "by every user of the machine: prefer its file or its variable."
    )


def run(settings: Settings, args: argparse.Namespace) -> int:
    from server.lifetime import configure_logging
    from server.supervisor import serve
    from server.tracing.start import traces_endpoint

    traces_endpoint()  # what is wrong with it stops the start here, in one sentence
    configure_logging(settings.log_level, settings.log_format)
    for key in KEYS:
        if getattr(args, key, None):
            flag = f"--{key.replace('_', '-')}"
            logger.warning(
                "%s: every user of this machine sees the key (ps); %s-file or TOME_%s hides it", flag, flag, key.upper()
            )
    settings.known_models()  # a repository that cannot be read stops a start, but no engine that starts again
    return serve(settings)
