"""Top-1, agreement with r=0 and speed of a model at each `r`, over a folder of labelled photos.

python -m benchmarks.accuracy --model NAME --weights FILE --data FOLDER --r 0 4 8 11 13 16
python -m benchmarks.accuracy ... --method tome,prune-attention,prune-random   # against pruning
python -m benchmarks.accuracy ... --ablate                                     # the paper's choices, one at a time

FOLDER holds `labels.csv` (columns `file` and `label`, a class index) and `images/`. The server's own code decodes,
preprocesses and runs the photos. The last line is JSON: {"rows": [{"method", "r", "top1", "agreement", "to_tome",
"images", ...}]}; `to_tome` is the difference in top-1 to token merging at the same `r`, with the ends of its 95 %
interval.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.variants import CHOICES, METHODS, Variant
from server.device.models import LoadedModel, load_model
from server.device.prepared import stacked
from server.device.runner import Runner
from server.images.pillow import decode
from server.intervals import paired_difference
from server.model_spec import ModelSpec
from server.types import ModelInfo
from tome_core import MergedViT

MAX_PIXELS = 89_000_000


class Case(NamedTuple):
    """A measured combination; at r=0 nothing merges, and the method is "none"."""

    method: str
    r: int


UNMERGED = Case("none", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="bundled", help="as for tome-server serve (default: bundled)")
    parser.add_argument("--weights", help="safetensors file for a timm name")
    parser.add_argument("--data", type=Path, required=True, help="folder with labels.csv and images/")
    parser.add_argument(
        "--r", type=int, nargs="+", metavar="R", help="values of r (default: 0 4 8 11 13 16; with --ablate 8 13 16)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--method", default="tome", help=f"one or more of {', '.join(METHODS)} (default: tome)")
    what.add_argument("--ablate", action="store_true", help=f"compare tome with {', '.join(CHOICES)}")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="use this many photos")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--plot", type=Path, help="draw the table into this file (needs matplotlib)")
    args = parser.parse_args()
    names = ["tome", *CHOICES] if args.ablate else args.method.split(",")
    unknown = [name for name in names if name not in METHODS | CHOICES]
    if unknown:
        parser.error(f"there is no method {unknown[0]!r}; there are: {', '.join(METHODS | CHOICES)}")
    ladder = args.r or ([8, 13, 16] if args.ablate else [0, 4, 8, 11, 13, 16])

    # Parsed from a mapping, as a YAML file's would be, so that the name is filled in.
    loaded = load_model(ModelSpec.model_validate({"source": args.model, "weights": args.weights}))
    try:
        methods = {name: (METHODS | CHOICES)[name](loaded.merged.model) for name in names}
    except ValueError as error:
        raise SystemExit(f"{loaded.info.name}: {error}") from error
    pixels, labels = read_photos(args.data, loaded.info, args.limit)
    bench = Bench(loaded, methods, args.device, args.precision)
    rows = bench.measure(pixels, labels, ladder, args.batch_size)
    print(f"{loaded.info.name}, {len(pixels)} photos of {args.data.name}, batch {args.batch_size}")
    print(table(rows))
    if args.plot:
        from benchmarks.plot import draw_differences, draw_methods  # on demand: matplotlib is slow to import

        (draw_differences if args.ablate else draw_methods)(rows, args.plot)
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


class Bench:
    """One model's weights under several methods, each run as in the server.

    Args:
        loaded: The model.
        methods: The same model wrapped in other ways, by name.
        device: See `Runner`.
        precision: See `Runner`.
    """

    def __init__(self, loaded: LoadedModel, methods: Mapping[str, MergedViT], device: str, precision: str) -> None:
        self._methods = {"none": loaded.merged, **methods}
        self._infos = {name: replace(loaded.info, name=name) for name in self._methods}
        self._runner = Runner(
            {name: LoadedModel(model, self._infos[name]) for name, model in self._methods.items()}, device, precision
        )

    def measure(
        self, pixels: Sequence[bytes], labels: Sequence[int], ladder: Sequence[int], batch_size: int
    ) -> list[dict[str, Any]]:
        """One row for each `r` and method; r=0 is always measured, because agreement needs it.

        Every batch runs in every case in turn, so that other load of the machine affects all of them alike.
        """
        cases = [Case(name, r) for r in dict.fromkeys(ladder) if r for name in self._methods if name != "none"]
        guesses: dict[Case, list[int]] = {case: [] for case in (UNMERGED, *cases)}
        per_image_s: dict[Case, list[float]] = {case: [] for case in guesses}
        for at in range(-batch_size, len(pixels), batch_size):  # the first round is warm-up: its batch comes again
            first = max(at, 0)
            images = pixels[first : first + batch_size]
            for case in guesses:
                start = time.perf_counter()
                answers = self._run(case, images, first)
                if at >= 0:
                    per_image_s[case].append((time.perf_counter() - start) / len(images))
                    guesses[case] += answers
        return [
            {
                "method": case.method,
                "r": case.r,
                "top1": share(guesses[case], labels),
                "agreement": share(guesses[case], guesses[UNMERGED]),
                "to_tome": self._to_tome(case, guesses, labels),
                "images": len(pixels),
                "tokens": self._infos[case.method].token_counts(self._infos[case.method].schedule(case.r))[-1],
                "images_per_s": 1 / statistics.median(per_image_s[case]),
            }
            for case in guesses
        ]

    def _run(self, case: Case, images: Sequence[bytes], first: int) -> list[int]:
        """The likeliest class of each image; `first` is the place of the first image among all."""
        info, model = self._infos[case.method], self._runner.merged(case.method)
        if isinstance(model, Variant):
            model.first_image = first
        schedule = info.schedule(case.r)
        key = info.batch_key(schedule)
        answers = self._runner.top_k(key, stacked(images, key.input_size, self._runner.device), 1)
        return [indices[0] for indices, _ in answers]

    def _to_tome(
        self, case: Case, guesses: Mapping[Case, Sequence[int]], labels: Sequence[int]
    ) -> tuple[float, float, float] | None:
        tome = guesses.get(Case("tome", case.r))
        if tome is None or case.method == "tome":
            return None
        return paired_difference(
            *([g == label for g, label in zip(of, labels, strict=True)] for of in (guesses[case], tome))
        )


def share(guesses: Sequence[int], truth: Sequence[int]) -> float:
    """The share of the guesses that is true."""
    return sum(guess == label for guess, label in zip(guesses, truth, strict=True)) / len(truth)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the rows; the speed-up is over the first row."""
    width = max(len(row["method"]) for row in rows)
    lines = [
        f"{'method':<{width}} {'r':>4} {'tokens left':>12} {'top-1 %':>8} {'agree %':>8} {'to tome, 95 %':>22} "
        f"{'images/s':>9} {'speed-up':>9}"
    ]
    for row in rows:
        to_tome = ""
        if row["to_tome"]:
            difference, low, high = (100 * value for value in row["to_tome"])
            to_tome = f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(
            f"{row['method']:<{width}} {row['r']:>4} {row['tokens']:>12} {100 * row['top1']:>8.1f} "
            f"{100 * row['agreement']:>8.1f} {to_tome:>22} {row['images_per_s']:>9.1f} "
            f"{row['images_per_s'] / rows[0]['images_per_s']:>8.2f}x"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
