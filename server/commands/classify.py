"""`tome-server classify`: classify photos here and now, without a server."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from server.commands.asked import OFFLINE_SETTINGS, add_class_arguments, classification, plain_r
from server.commands.output import tell
from server.dial import r_of
from server.settings import Settings

if TYPE_CHECKING:
    from server.ipc.messages import Classify
    from server.offline.model import Answer, Computes
    from server.types import ModelInfo

HELP = "classify photos and folders of photos here and now, without a server"
SETTINGS = OFFLINE_SETTINGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prints the likeliest classes of each photo. A file that cannot be read gets a line with its error, and the "
        "others go on; the exit status is 1 then. With --backend auto, photos that fit into one batch are computed by "
        "torch, which is ready soonest."
    )
    parser.add_argument("images", nargs="+", metavar="PHOTO|FOLDER", help="image file, or folder of them")
    add_class_arguments(parser, default="5")
    parser.add_argument("--json", action="store_true", help="print JSON, one line a photo")


def run(settings: Settings, args: argparse.Namespace) -> int:
    from server.offline.devices import open_devices
    from server.offline.files import images_of
    from server.offline.reading import parts

    plain_r(settings)
    files = images_of(args.images)
    if settings.backend == "auto" and len(files) <= settings.max_batch_size:
        settings = settings.model_copy(update={"backend": "torch"})
    errors = 0
    with closing(open_devices(settings)) as devices:
        info = devices.served.info
        ask = classification(settings, args, info)
        for file, answer in _answers(devices, ask, list(parts(files, settings.max_batch_size))):
            errors += isinstance(answer, str)
            _print(file, answer, ask, info, args.json)
    if errors and len(files) > 1:
        tell(f"{errors} of {len(files)} files have an error")
    return 1 if errors else 0


def _answers(devices: Computes, ask: Classify, batches: Sequence[Sequence[str]]) -> Iterator[tuple[str, Answer]]:
    """Each file with its answer, as soon as its batch is computed."""
    devices.warm_up(ask)
    with closing(devices.answers(ask, batches)) as answers:
        for files, answered in zip(batches, answers, strict=True):
            yield from zip(files, answered, strict=True)


def _print(file: str, answer: Answer, ask: Classify, info: ModelInfo, as_json: bool) -> None:
    """Prints the classes of one file, or its error. `r` reads as in an answer of the server."""
    from server.ipc.messages import TopK
    from server.offline.model import schedule_of
    from server.offline.rows import printable

    name, schedule = printable(file), schedule_of(ask)
    found = info.named(answer.indices, answer.scores) if isinstance(answer, TopK) else []
    error = answer if isinstance(answer, str) else None
    if as_json:
        said = {"file": name, "model": info.name, "r": r_of(schedule), "tuned": info.is_tuned(schedule)}
        print(json.dumps({**said, "function_to_apply": ask.activation, "top_k": found, "error": error}), flush=True)
    elif error is not None:
        tell(f"{name}: {error}")
    else:
        form = "6.2f" if ask.activation == "none" else "6.1%"
        print(name, *(f"  {each['score']:{form}}  {each['label']}" for each in found), sep="\n", flush=True)
