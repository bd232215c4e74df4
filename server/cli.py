"""The `tome-server` command: `serve`, `classify` without a server, and `models`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server import __version__
from server.errors import ServerError
from server.settings import ModelSpec, Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from server.models import LoadedModel

_MODEL_FLAGS = ("model", "weights")
_CLASSIFY_FLAGS = (*_MODEL_FLAGS, "r", "device", "precision", "threads")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives its exit status."""
    args = _parser().parse_args(argv)
    flags = {name: getattr(args, name, None) for name in Settings.model_fields}
    try:
        settings = load_settings(flags, args.config)
        status: int = args.run(settings, args)
        return status
    except (SettingsError, ServerError) as error:
        print(f"tome-server: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tome-server", description="Image classification with a speed/accuracy dial.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="run the server",
        description="Runs the server. Every flag is a TOME_* variable (TOME_MAX_BATCH_SIZE=64) and a key of the YAML "
        "file too; a flag wins over a variable, a variable over the file.",
    )
    serve.set_defaults(run=_serve)
    classify = commands.add_parser("classify", help="classify photos here and now, without a server")
    classify.add_argument("photos", nargs="+", metavar="PHOTO", help="image file")
    classify.add_argument("--top-k", type=int, help="classes to name (default: 5, or all where there are fewer)")
    classify.add_argument("--json", action="store_true", help="print JSON, one line a photo")
    classify.set_defaults(run=_classify)
    models = commands.add_parser("models", help="load the models that serve would and describe them")
    models.add_argument("--json", action="store_true", help="print JSON, one line a model")
    models.set_defaults(run=_models)

    for command, names in ((serve, Settings.model_fields), (classify, _CLASSIFY_FLAGS), (models, _MODEL_FLAGS)):
        command.add_argument("--config", metavar="FILE", help="YAML file of settings")
        for name in names:
            field = Settings.model_fields[name]
            default = "bundled" if name == "model" else field.default
            text = (field.description or "log this much: debug, info, warning, error").replace("%", "%%")
            action = "append" if name == "model" else "store"
            shown = "" if default is None else f" (default: {default})"
            command.add_argument(f"--{name.replace('_', '-')}", action=action, metavar="VALUE", help=text + shown)
    return parser


def _serve(settings: Settings, args: argparse.Namespace) -> int:
    from server.supervisor import serve

    return serve(settings)


def _classify(settings: Settings, args: argparse.Namespace) -> int:
    from server.api.decode import decode
    from server.engine.runner import Runner, set_threads
    from server.types import Job

    set_threads(settings.threads)
    spec = settings.specs()[0]
    loaded = _load(spec)
    info = loaded.info
    schedule = info.schedule(spec.r or 0)
    top_k = min(5, len(info.labels)) if args.top_k is None else args.top_k
    if not 1 <= top_k <= len(info.labels):
        raise SettingsError(f"--top-k is {top_k}; it must lie between 1 and {len(info.labels)}")
    runner = Runner({info.name: loaded}, settings.device, settings.precision)
    key = info.batch_key(schedule)
    for photo in args.photos:
        try:
            pixels = decode(Path(photo).read_bytes(), info.preprocessing, settings.max_image_pixels)
        except OSError as error:
            raise SettingsError(f"{photo}: {error.strerror}") from None
        except ServerError as error:
            raise SettingsError(f"{photo}: {error.message}") from None
        (likeliest,) = runner.run_batch(key, [Job(info.name, pixels, schedule, top_k, settings.deadline_s)])
        classes = [
            {"label": info.labels[index], "index": index, "score": score}
            for index, score in zip(likeliest.indices, likeliest.scores, strict=True)
        ]
        if args.json:
            print(json.dumps({"file": photo, "model": info.name, "r": list(schedule), "top_k": classes}))
        else:
            print(photo)
            for each in classes:
                print(f"  {each['score']:6.1%}  {each['label']}")
    return 0


def _models(settings: Settings, args: argparse.Namespace) -> int:
    for spec in settings.specs():
        loaded = _load(spec)
        info, counts = loaded.info, loaded.merged.token_counts
        ladder = {r: counts(r)[-1] for r in (0, 4, 8, 12, 16, 20) if r <= info.max_r}
        if args.json:
            described = {name: value for name, value in info.to_wire().items() if name != "labels"}
            print(json.dumps({**described, "num_classes": len(info.labels), "tokens_left": ladder}))
            continue
        height, width = info.preprocessing.input_size
        print(f"{info.name}: {info.architecture} from {info.source}")
        print(
            f"  {len(info.labels)} classes, {height} x {width} px, {info.num_blocks} blocks, r from 0 to {info.max_r}"
        )
        print("  tokens left: " + ", ".join(f"{count} at r={r}" for r, count in ladder.items()))
    return 0


def _load(spec: ModelSpec) -> LoadedModel:
    from server.models import load_model  # imports torch: 'serve' and --help do without

    return load_model(spec)


if __name__ == "__main__":
    sys.exit(main())
