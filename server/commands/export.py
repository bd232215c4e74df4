"""`tome-server export`: write a model at one `r` as an ONNX file, for a runtime without Python or torch."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from server import __version__
from server.commands.asked import plain_r
from server.commands.output import check_place, spare_others
from server.errors import SettingsError
from server.settings import Settings

HELP = "write a model at one r as an ONNX file"
SETTINGS: tuple[str, ...] = ("model", "weights", "tuned", "r", "state_dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="ONNX file to write")
    parser.add_argument(
        "--inflect", type=float, metavar="X", help="makes r a ramp: -1 from 2r down to 0, 1 from 0 up to 2r"
    )
    parser.add_argument(
        "--opset", type=int, default=20, metavar="N", help="version of the ONNX operators (default: 20)"
    )


def run(settings: Settings, args: argparse.Namespace) -> int:
    check_place("-o", args.output)
    spare_others(args.output, _check_name, "is no .onnx file")
    r = plain_r(settings)

    from server.device.models import load_model
    from tome_core import ExportError, export_onnx

    spec = settings.specs()[0]
    loaded = load_model(spec, settings.state_dir)
    info = loaded.info
    schedule = info.schedule(r, args.inflect)
    tokens = info.token_counts(schedule)
    facts = {
        "name": info.name,
        "architecture": info.architecture,
        "token_counts": tokens,
        "tuned": info.is_tuned(schedule),
        **asdict(info.preprocessing),
        "labels": info.labels,
        "version": __version__,
    }
    input_size = info.preprocessing.input_size
    try:
        written = export_onnx(loaded.merged, schedule, input_size, args.output, opset=args.opset, metadata=facts)
    except ExportError as error:
        raise SettingsError(str(error)) from error
    except OSError as error:
        raise SettingsError(f"{args.output}: {error.strerror}") from error
    height, width = input_size
    outputs = f"logits (batch, {len(info.labels)})" if info.labels else f"features (batch, {info.num_features})"
    print(f"{written.path}: {info.architecture}, {written.num_bytes / 1e6:.1f} MB, opset {args.opset}")
    print(f"  images (batch, 3, {height}, {width}) to {outputs}")
    print(f"  tokens: {tokens[0]} come in, {tokens[-1]} are left")
    if written.difference is None:
        print("  not compared with torch: onnxruntime is not installed")
    else:
        print(f"  largest difference from torch: {written.difference:.1e}")
    return 0


def _check_name(file: Path) -> None:
    """Raises ValueError for a file that is not called ONNX."""
    if file.suffix != ".onnx":
        raise ValueError
