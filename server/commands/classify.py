"""`tome-server classify`: classify photos here and now, without a server."""

from __future__ import annotations

import argparse
import json

from server.commands.top_k import add_class_arguments, named_classes
from server.settings import Settings

HELP = "classify photos here and now, without a server"
SETTINGS: tuple[str, ...] = ("model", "weights", "tuned", "r", "device", "precision", "threads", "state_dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image file")
    add_class_arguments(parser, default="5")
    parser.add_argument("--json", action="store_true", help="print JSON, one line a photo")


def run(settings: Settings, args: argparse.Namespace) -> int:
    from server.device.models import load_model
    from server.device.prepared import stacked
    from server.device.runner import Runner
    from server.device.torch_backend import set_threads
    from server.images.photos import read_photo

    set_threads(settings.threads)
    spec = settings.specs()[0]
    loaded = load_model(spec, settings.state_dir)
    info = loaded.info
    schedule = info.schedule(spec.r or 0)
    top_k, activation = named_classes(args, info)
    runner = Runner({info.name: loaded}, settings.device, settings.precision)
    key = info.batch_key(schedule)
    for photo in args.photos:
        pixels = read_photo(photo, info.preprocessing, settings.max_image_pixels)
        batch = stacked([pixels], key.input_size, runner.device)
        ((likeliest, scores),) = runner.top_k(key, batch, top_k, activation)
        found = [each for each in info.named(likeliest, scores) if each["score"] >= (args.threshold or float("-inf"))]
        if args.json:
            said = {"file": photo, "model": info.name, "r": list(schedule), "tuned": info.is_tuned(schedule)}
            print(json.dumps({**said, "function_to_apply": activation, "top_k": found}))
        else:
            print(photo)
            form = "6.2f" if activation == "none" else "6.1%"
            for each in found:
                print(f"  {each['score']:{form}}  {each['label']}")
    return 0
