"""`tome-server classify`: classify photos here and now, without a server."""

from __future__ import annotations

import argparse
import json

from server.commands.top_k import checked_top_k
from server.settings import Settings

HELP = "classify photos here and now, without a server"
SETTINGS: tuple[str, ...] = ("model", "weights", "tuned", "r", "device", "precision", "threads", "state_dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image file")
    parser.add_argument("--top-k", type=int, help="classes to name (default: 5, or all where there are fewer)")
    parser.add_argument("--json", action="store_true", help="print JSON, one line a photo")


def run(settings: Settings, args: argparse.Namespace) -> int:
    from server.device.models import load_model
    from server.device.prepared import stacked
    from server.device.runner import Runner
    from server.device.torch_backend import set_threads
    from server.images.photos import read_photo
    from server.offline.rows import classes

    set_threads(settings.threads)
    spec = settings.specs()[0]
    loaded = load_model(spec, settings.state_dir)
    info = loaded.info
    schedule = info.schedule(spec.r or 0)
    top_k = checked_top_k(args.top_k, info, default=5)
    runner = Runner({info.name: loaded}, settings.device, settings.precision)
    key = info.batch_key(schedule)
    for photo in args.photos:
        pixels = read_photo(photo, info.preprocessing, settings.max_image_pixels)
        ((likeliest, scores),) = runner.top_k(key, stacked([pixels], key.input_size, runner.device), top_k)
        found = classes(info, likeliest, scores)
        if args.json:
            said = {"file": photo, "model": info.name, "r": list(schedule), "tuned": info.is_tuned(schedule)}
            print(json.dumps({**said, "top_k": found}))
        else:
            print(photo)
            for each in found:
                print(f"  {each['score']:6.1%}  {each['label']}")
    return 0
