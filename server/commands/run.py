"""`tome-server run`: compute a folder of photos into a table, without a server."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.commands.asked import OFFLINE_SETTINGS, add_class_arguments, classification, plain_r
from server.commands.output import check_place, spare_others, tell
from server.commands.progress import Progress
from server.commands.stopping import Stop
from server.dial import r_of, text_of
from server.errors import SettingsError
from server.settings import Settings

if TYPE_CHECKING:
    from server.offline.formats import Format
    from server.offline.model import Answer, Ask, Served
    from server.offline.rows import Table
    from server.offline.unfinished import Unfinished
    from server.types import ModelInfo

HELP = "compute a folder of photos into a table of labels or vectors, without a server"
SETTINGS = OFFLINE_SETTINGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a row for each file: file, model, r, tuned, the likeliest class or a vector, and the error of a file "
        "that cannot be read. Ctrl-C keeps what is done, and the same command goes on from there."
    )
    parser.add_argument("source", metavar="FOLDER|LIST", help="folder of photos, or text file with a path a line")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FILE", help="table to write: .parquet, .jsonl or .csv"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the table that is there")
    add_class_arguments(parser, default="1")
    parser.add_argument("--embed", action="store_true", help="write the vector that the classifier reads, not classes")
    parser.add_argument("--no-normalize", action="store_true", help="with --embed: leave vectors as long as they are")


def run(settings: Settings, args: argparse.Namespace) -> int:
    from server.offline.devices import open_devices
    from server.offline.files import files_of
    from server.offline.formats import format_of
    from server.offline.reading import parts
    from server.offline.rows import Table, printable
    from server.offline.unfinished import Unfinished

    _check(args)
    plain_r(settings)
    form = format_of(args.output)
    _spare(args.output, args.overwrite, form)
    files = files_of(args.source)
    tell(f"loading {settings.specs()[0].name}")
    with closing(open_devices(settings)) as devices:
        served = devices.served
        ask = _ask(settings, args, served.info)
        table = Table(served.info, ask, not args.no_normalize)
        about = _about(settings, args, served, ask)
        with closing(Unfinished(args.output, form, table.columns, about, args.overwrite)) as unfinished:
            left = [file for file in files if printable(file) not in unfinished.done]
            if unfinished.done:
                tell(f"going on: {len(files) - len(left):,} of {len(files):,} images have a row already")
            devices.warm_up(ask)
            progress = Progress(len(files), len(files) - len(left))
            batches = list(parts(left, settings.max_batch_size))
            with Stop("stopping after this batch; what is done is kept") as stop:
                _compute(devices.answers(ask, batches), batches, table, unfinished, progress, stop)
            is_whole = progress.images == len(left)
            if is_whole:
                unfinished.finish()
            else:
                tell(f"stopped; {unfinished.folder} keeps the rows, and the same command goes on from here")
    print(
        json.dumps(
            {
                "output": str(args.output),
                "complete": is_whole,
                "images": progress.images,
                "errors": progress.errors,
                "earlier": len(files) - len(left),
                "seconds": round(progress.seconds, 3),
                "images_per_s": round(progress.images_per_s, 1),
            }
        )
    )
    return 0 if is_whole else 128 + (stop.number or 0)


def _compute(
    answers: Generator[list[Answer], None, None],
    batches: Sequence[Sequence[str]],
    table: Table,
    unfinished: Unfinished,
    progress: Progress,
    stop: Stop,
) -> None:
    """Adds the rows of all batches, until a stop is requested. The rows are kept even after an error."""
    try:
        with closing(answers):
            for files, answered in zip(batches, answers, strict=False):
                unfinished.add(list(table.rows(files, answered)))
                progress.add(len(files), sum(isinstance(answer, str) for answer in answered))
                if stop.is_asked:
                    break
    finally:
        unfinished.keep()


def _spare(output: Path, may_replace: bool, form: Format) -> None:
    """Refuses an output without a folder, and one that must not be replaced."""
    check_place("-o", output)
    spare_others(output, form.check, "holds no table of this command")
    if os.path.exists(output) and not may_replace:
        raise SettingsError(f"-o is {output}, which is there already; --overwrite replaces it")


def _check(args: argparse.Namespace) -> None:
    """Refuses arguments that are wrong for any model."""
    if args.embed:
        for flag in ("top_k", "function_to_apply", "threshold"):
            if getattr(args, flag) is not None:
                raise SettingsError(f"--{flag.replace('_', '-')} goes without --embed")
    elif args.no_normalize:
        raise SettingsError("--no-normalize goes with --embed")


def _ask(settings: Settings, args: argparse.Namespace, info: ModelInfo) -> Ask:
    """The request for every image. Raises SettingsError or InvalidError if the model cannot answer it."""
    from server.ipc.messages import Embed

    if args.embed:
        return Embed(model=info.name, images=[], r=info.schedule(plain_r(settings)), deadline=math.inf)
    return classification(settings, args, info, default=1)


def _about(settings: Settings, args: argparse.Namespace, served: Served, ask: Ask) -> dict[str, Any]:
    """All that the content of the rows depends on, under the names of flags if there are such."""
    from server.offline.model import schedule_of

    said: dict[str, Any] = {
        "FOLDER|LIST": args.source,
        "--model": settings.specs()[0].source,
        "name": served.info.name,
        "sha256 of the weights": served.weights,
        "sha256 of tuned numbers": served.tuned,
        "sha256 of classes and preprocessing": _sha256((served.info.labels, served.info.preprocessing)),
        "--r": text_of(r_of(schedule_of(ask))),
        "--precision": settings.precision,
        "--backend": settings.backend,
        "--embed": args.embed,
    }
    if args.embed:
        return said | {"--no-normalize": args.no_normalize}
    shown = ("top_k", "activation", "threshold")
    return said | {name: getattr(ask, name) for name in shown}


def _sha256(described: object) -> str:
    return hashlib.sha256(repr(described).encode("utf-8", "backslashreplace")).hexdigest()
