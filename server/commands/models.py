"""`tome-server models`: describe the models that serve would load, check a model folder, or list timm's models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from server.errors import EngineError, SettingsError
from server.settings import Settings
from server.settings_sources import load_settings
from server.types import ModelInfo
from tome_core import names

HELP = "describe the models that serve would load, check a model folder, or list timm's models that can be served"
SETTINGS: tuple[str, ...] = ("model", "weights", "tuned", "state_dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, one line a model")
    parser.add_argument(
        "--check",
        metavar="FOLDER",
        help="load this model folder instead, compute a black image, and describe the model or its fault in one line",
    )
    parser.add_argument(
        "--supported",
        metavar="PATTERN",
        nargs="?",
        const="*",
        help="list the names of timm's models in which tokens can merge, with their classes; no weights are loaded. "
        "A pattern is a part of the name, such as dinov3, or has wildcards, such as 'vit_*_224'",
    )


def run(settings: Settings, args: argparse.Namespace) -> int:
    if args.supported is not None:
        print("\n".join(_supported(args.supported, args.json)))
        return 0
    from server.device.models import load_model

    if args.check is not None:
        print(_checked(args.check, settings))
        return 0
    for spec in settings.specs():
        loaded = load_model(spec, settings.state_dir)
        info, counts = loaded.info, loaded.merged.token_counts
        ladder = {r: counts(r)[-1] for r in (0, 4, 8, 12, 16, 20) if r <= info.max_r}
        if args.json:
            described = {name: value for name, value in asdict(info).items() if name != "labels"}
            tuned_file = loaded.tuned_file and str(loaded.tuned_file)
            print(
                json.dumps(
                    {**described, "tuned_file": tuned_file, "num_classes": len(info.labels), "tokens_left": ladder}
                )
            )
            continue
        height, width = info.preprocessing.input_size
        print(f"{info.name}: {info.architecture} from {info.source}")
        print(f"  {_gives(info)}, {height} x {width} px, {info.num_blocks} blocks, r from 0 to {info.max_r}")
        print("  tokens left: " + ", ".join(f"{count} at r={r}" for r, count in ladder.items()))
        if info.tuned:
            print(f"  tuned for {_bands(info.tuned)}: {loaded.tuned_file}")
    return 0


def _supported(pattern: str, as_json: bool) -> list[str]:
    """A line for each supported model of timm whose name matches.

    Raises:
        SettingsError: None matches.
    """
    found, classes = names.list_models(pattern), names.classes()
    if not found:
        raise SettingsError(f"none of the {len(classes)} supported models of timm has a name like {pattern!r}")
    if as_json:
        return [json.dumps({"name": name, "class": classes[name]}) for name in found]
    width = max(map(len, found))
    return [f"{name:<{width}}  {classes[name]}" for name in found]


def _checked(folder: str, settings: Settings) -> str:
    """Loads a model folder as a start would, raises the same errors, and returns a description.

    Wrong tuned numbers in the folder are an error here. A start would log them and go on.
    """
    from server.device.models import load_model
    from server.device.runner import Runner
    from server.device.tuned_file import beside, read

    source = f"local-dir:{folder.removeprefix('local-dir:')}"
    said = {"model": [{"source": source}], "weights": settings.weights, "tuned": settings.tuned}
    (spec,) = load_settings(said).specs()
    loaded = load_model(spec)
    info = loaded.info
    if spec.tuned == "auto" and not info.tuned and (file := beside(spec, loaded.weights)) and file.exists():
        read(file, loaded.merged)  # raises its fault
    try:
        Runner({info.name: loaded}, "cpu", "fp32").warm_up(info.batch_key(info.schedule(0)))
    except EngineError as error:
        raise SettingsError(str(error)) from error
    height, width = info.preprocessing.input_size
    parameters = sum(parameter.numel() for parameter in loaded.merged.parameters())
    return (
        f"{folder} is all right: {info.architecture}, {_gives(info)}, {height} x {width} px, "
        f"{parameters:,} parameters" + (f", tuned for {_bands(info.tuned)}" if info.tuned else "")
    )


def _gives(info: ModelInfo) -> str:
    """The model's outputs for an image."""
    if not info.labels:
        return f"no classes but {info.num_features} features"
    activation = "" if info.activation == "softmax" else f" by {info.activation}"
    return f"{len(info.labels)} classes{activation}, {info.num_features} features"


def _bands(bands: Sequence[tuple[int, int]]) -> str:
    return "r of " + ", ".join(f"{low} to {high}" for low, high in bands)
