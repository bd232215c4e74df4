"""The `tome-server` command: the settings that its commands share, and messages instead of tracebacks."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Literal, get_args, get_origin

from server import __version__
from server.caches import keep_caches_in
from server.commands import Command, bench, calibrate, classify, explain, export, models, run, serve, tune
from server.commands.described import WITHOUT_SERVER
from server.errors import InvalidError, ServerError, SettingsError
from server.settings import Settings
from server.settings_sources import load_settings
from tome_core import quiet  # noqa: F401  # this process and its children report to nobody

COMMANDS: dict[str, Command] = {
    "serve": serve,
    "classify": classify,
    "run": run,
    "models": models,
    "explain": explain,
    "export": export,
    "calibrate": calibrate,
    "tune": tune,
    "bench": bench,
}


_REPEATED = ("model", "cors_origin")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        Its exit status: 2 for a wrong setting or argument, as argparse has it.
    """
    args = _parser().parse_args(argv)
    flags = {name: getattr(args, name, None) for name in Settings.model_fields}
    try:
        settings = load_settings(flags, args.config)
        keep_caches_in(settings.state_dir)
        return COMMANDS[args.command].run(settings, args)
    except (SettingsError, ServerError) as error:
        print(f"tome-server: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError | InvalidError) else 1
    except BrokenPipeError:  # who read the answer has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes out what is left when it ends
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # the status that shells give to a process that Ctrl-C has ended


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tome-server", description="Image classification with a speed/accuracy dial.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        options = commands.add_parser(name, help=command.HELP)
        command.add_arguments(options)
        options.add_argument("--config", metavar="FILE", help="YAML file of settings")
        for setting in command.SETTINGS:
            _add_setting(options, setting, None if name in ("serve", "models") else WITHOUT_SERVER.get(setting))
    return parser


def _add_setting(parser: argparse.ArgumentParser, name: str, described: str | None) -> None:
    field = Settings.model_fields[name]
    text = (described or field.description or "how much the log says").replace("%", "%%")
    default = {"model": "bundled", "cors_origin": None}.get(name, field.default)
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        action="append" if name in _REPEATED else "store",
        metavar=_shown_values(field.annotation),
        help=text if default is None else f"{text} (default: {_as_written(default)})",
    )


def _shown_values(kind: object) -> str:
    """What help shows for the value of a setting: its choices where it has some. `Settings` checks them."""
    choices = ("true", "false") if kind is bool else get_args(kind) if get_origin(kind) is Literal else ()
    return f"{{{','.join(choices)}}}" if choices else "VALUE"


def _as_written(value: object) -> str:
    """A default as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
