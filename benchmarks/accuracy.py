"""Top-1, agreement with r=0 and speed of a model at each `r`, over a folder of labelled photos.

python -m benchmarks.accuracy --model NAME --weights FILE --data FOLDER --r 0,4,8,11,13,16

FOLDER holds `labels.csv` (columns `file` and `label`, a class index) and `images/`. Photos are decoded and
preprocessed by the server's own code. The last line is JSON: {"rows": [{"r", "top1", "agreement", "images", ...}]}.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from server.api.decode import decode
from server.engine.runner import Runner
from server.models import load_model
from server.settings import ModelSpec
from server.types import Job, ModelInfo

MAX_PIXELS = 89_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="bundled", help="as for tome-server serve (default: bundled)")
    parser.add_argument("--weights", help="safetensors file for a timm name")
    parser.add_argument("--data", type=Path, required=True, help="folder with labels.csv and images/")
    parser.add_argument("--r", default="0,4,8,11,13,16", help="values of r (default: 0,4,8,11,13,16)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="use this many photos")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()

    # Parsed from a mapping, as a YAML file's would be, so that the name is filled in.
    loaded = load_model(ModelSpec.model_validate({"source": args.model, "weights": args.weights}))
    runner = Runner({loaded.info.name: loaded}, args.device, args.precision)
    pixels, labels = read_photos(args.data, loaded.info, args.limit)
    rows = measure(runner, loaded.info, pixels, labels, [int(r) for r in args.r.split(",")], args.batch_size)
    print(f"{loaded.info.name}, {len(pixels)} photos of {args.data.name}, batch {args.batch_size}")
    print(f"{'r':>4} {'tokens left':>12} {'top-1 %':>8} {'agree %':>8} {'images/s':>9} {'speed-up':>9}")
    for row in rows:
        print(
            f"{row['r']:>4} {row['tokens']:>12} {100 * row['top1']:>8.1f} {100 * row['agreement']:>8.1f} "
            f"{row['images_per_s']:>9.1f} {row['images_per_s'] / rows[0]['images_per_s']:>8.2f}x"
        )
    print(json.dumps({"model": loaded.info.name, "rows": rows}))


def read_photos(folder: Path, info: ModelInfo, limit: int | None = None) -> tuple[list[bytes], list[int]]:
    """The model's input pixels of every listed photo, and their class indices."""
    with (folder / "labels.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))[:limit]
    if not listed:
        raise SystemExit(f"{folder / 'labels.csv'} lists no photo")
    with ThreadPoolExecutor() as pool:
        files = [folder / "images" / row["file"] for row in listed]
        pixels = list(pool.map(lambda file: decode(file.read_bytes(), info.preprocessing, MAX_PIXELS), files))
    return pixels, [int(row["label"]) for row in listed]


def measure(
    runner: Runner,
    info: ModelInfo,
    pixels: Sequence[bytes],
    labels: Sequence[int],
    ladder: Sequence[int],
    batch_size: int,
) -> list[dict[str, Any]]:
    """One row for each `r`; r=0 is measured too where it is not asked for, since agreement needs it.

    Every batch runs under each `r` in turn, so that whatever else the machine does falls on all of them alike.
    """
    schedules = {r: info.schedule(r) for r in dict.fromkeys([0, *ladder])}
    guesses: dict[int, list[int]] = {r: [] for r in schedules}
    per_image_s: dict[int, list[float]] = {r: [] for r in schedules}
    for at in range(-batch_size, len(pixels), batch_size):  # the first round is warm-up: its batch comes again
        images = pixels[max(at, 0) : max(at, 0) + batch_size]
        for r, schedule in schedules.items():
            start = time.perf_counter()
            answers = runner.run_batch(
                info.batch_key(schedule), [Job(info.name, image, schedule, 1, 0.0) for image in images]
            )
            if at >= 0:
                per_image_s[r].append((time.perf_counter() - start) / len(images))
                guesses[r] += [answer.indices[0] for answer in answers]
    return [
        {
            "r": r,
            "top1": share(guesses[r], labels),
            "agreement": share(guesses[r], guesses[0]),
            "images": len(pixels),
            "tokens": info.token_counts(schedule)[-1],
            "images_per_s": 1 / statistics.median(per_image_s[r]),
        }
        for r, schedule in schedules.items()
    ]


def share(guesses: Sequence[int], truth: Sequence[int]) -> float:
    """The part of the guesses that is true."""
    return sum(guess == label for guess, label in zip(guesses, truth, strict=True)) / len(truth)


if __name__ == "__main__":
    main()
