"""`tome-server serve`: run the server."""

from __future__ import annotations

import argparse
import importlib.util
import logging

from server.errors import SettingsError
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

    traces_endpoint()  # checks it
    _check(settings)
    configure_logging(settings.log_level, settings.log_format)
    for key in KEYS:
        if getattr(args, key, None):
            flag = f"--{key.replace('_', '-')}"
            logger.warning(
                "%s: every user of this machine sees the key (ps); %s-file or TOME_%s hides it", flag, flag, key.upper()
            )
    return serve(settings)


def _check(settings: Settings) -> None:
    """Checks what needs no torch before any process starts; raises SettingsError."""
    from server.model_config import check_files

    settings.known_models()  # a repository that cannot be read stops a start, but no engine that starts again
    settings.state_file()
    for spec in settings.specs():
        try:
            check_files(spec)
        except SettingsError as error:
            raise SettingsError(f"model {spec.name}: {error}") from None
    if settings.backend == "openvino" and importlib.util.find_spec("openvino") is None:
        raise SettingsError("backend openvino needs the package openvino: pip install 'tome-server[openvino]'")
