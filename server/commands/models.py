"""`tome-server models`: load the models that serve would and describe them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from server.settings import Settings

HELP = "load the models that serve would and describe them"
SETTINGS: tuple[str, ...] = ("model", "weights")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, one line a model")


def run(settings: Settings, args: argparse.Namespace) -> int:
    from server.device.models import load_model

    for spec in settings.specs():
        loaded = load_model(spec)
        info, counts = loaded.info, loaded.merged.token_counts
        ladder = {r: counts(r)[-1] for r in (0, 4, 8, 12, 16, 20) if r <= info.max_r}
        if args.json:
            described = {name: value for name, value in asdict(info).items() if name != "labels"}
            print(json.dumps({**described, "num_classes": len(info.labels), "tokens_left": ladder}))
            continue
        height, width = info.preprocessing.input_size
        print(f"{info.name}: {info.architecture} from {info.source}")
        print(
            f"  {len(info.labels)} classes, {height} x {width} px, {info.num_blocks} blocks, r from 0 to {info.max_r}"
        )
        print("  tokens left: " + ", ".join(f"{count} at r={r}" for r, count in ladder.items()))
    return 0
