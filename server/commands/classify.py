"""`tome-server classify`: classify photos here and now, without a server."""

from __future__ import annotations

import argparse
import json

from server.settings import Settings, SettingsError

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

    set_threads(settings.threads)
    spec = settings.specs()[0]
    loaded = load_model(spec, settings.state_dir)
    info = loaded.info
    schedule = info.schedule(spec.r or 0)
    top_k = min(5, len(info.labels)) if args.top_k is None else args.top_k
    if not 1 <= top_k <= len(info.labels):
        raise SettingsError(f"--top-k is {top_k}; it must lie between 1 and {len(info.labels)}")
    runner = Runner({info.name: loaded}, settings.device, settings.precision)
    key = info.batch_key(schedule)
    for photo in args.photos:
        pixels = read_photo(photo, info.preprocessing, settings.max_image_pixels)
        ((likeliest, scores),) = runner.top_k(key, stacked([pixels], key.input_size, runner.device), top_k)
        classes = [
            {"label": info.labels[index], "index": index, "score": score}
            for index, score in zip(likeliest, scores, strict=True)
        ]
        if args.json:
            said = {"file": photo, "model": info.name, "r": list(schedule), "tuned": info.is_tuned(schedule)}
            print(json.dumps({**said, "top_k": classes}))
        else:
            print(photo)
            for each in classes:
                print(f"  {each['score']:6.1%}  {each['label']}")
    return 0
