"""The gain of tuning: agreement and top-1 at each `r` before and after, on held-out photos.

python -m benchmarks.tuning --model NAME --weights FILE --data FOLDER                  # the product's own recipe
python -m benchmarks.tuning ... --variant 'product; not mixed' --jobs 2                   # against other choices

FOLDER holds `labels.csv` (columns `file` and `label`, a class index) and `images/`. The photos are split into five
folds; each is judged by parameters that were tuned on the four others. On a machine with GPUs the folds and variants
run side by side, `--jobs` on each. The last line is JSON: {"rows": [{"variant", "r", "top1", "agreement", "gain",
"top1_gain", "seconds"}]}; the gains are points over the same model untuned, with the ends of their 95 % intervals.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from server.calibration.photos import read_photos
from server.device.models import LoadedModel, load_model
from server.device.prepared import stacked
from server.images.photos import choose_photos
from server.intervals import paired_difference
from server.model_spec import ModelSpec
from server.tuning.learning import drawn
from server.tuning.photos import normalised, read_squares
from tome_core.tuned import tunable
from tome_core.tuning import Recipe, Tuner, divergence

FOLDS = 5
LADDER = (0, 8, 11, 12, 13, 14, 15, 16, 17, 18)
BATCH = 100
MAX_PIXELS = 89_000_000


@dataclass(frozen=True)
class Variant:
    """One way to tune.

    Attributes:
        bands: Lowest and highest `r` of each set of parameters.
        recipe: The recipe.
        learned: The learned parameters: "norms and biases", one of the two, "with tokens", "with head" or "whole".
        mixed: Every `mixed`-th batch is mixed; 0 for none.
        photos: Most photos to learn from; 0 for all of the four folds.
        more: Whether to learn from the images of `--more` too.
    """

    bands: tuple[tuple[int, int], ...] = ((12, 18),)
    recipe: Recipe = field(default_factory=Recipe)
    learned: str = "norms and biases"
    mixed: int = 2
    photos: int = 0
    more: bool = False


THREE = ((12, 14), (15, 16), (17, 18))
VARIANTS = {
    "product": Variant(),
    "half of the views": Variant(recipe=Recipe(batch_size=64)),
    "twice the views": Variant(recipe=Recipe(steps=900, batch_size=192)),
    "six times the views": Variant(recipe=Recipe(steps=2700, batch_size=192)),
    "three bands": Variant(THREE, Recipe(steps=200)),
    "temperature 1": Variant(recipe=Recipe(temperature=1.0)),
    "twice the rate": Variant(recipe=Recipe(learning_rate=2e-3)),
    "not mixed": Variant(mixed=0),
    "100 photos": Variant(photos=100),
    "300 photos": Variant(photos=300),
    "more photos": Variant(more=True),
    "norms": Variant(learned="norms"),
    "biases": Variant(learned="biases"),
    "with tokens": Variant(learned="with tokens"),
    "with head": Variant(learned="with head"),
    "whole": Variant(recipe=Recipe(learning_rate=3e-5), learned="whole"),
    "low r": Variant(((6, 8), (9, 11))),
}


def learned_names(kind: str, loaded: LoadedModel) -> list[str]:
    """The names of a variant's learned parameters."""
    model = loaded.merged.model
    own, every = list(tunable(model, loaded.merged.family)), dict(model.named_parameters())
    return {
        "norms and biases": own,
        "norms": [name for name in own if "norm" in name],
        "biases": [name for name in own if "norm" not in name],
        "with tokens": [*own, "cls_token", "pos_embed"],
        "with head": [name for name, each in every.items() if each.ndim == 1],
        "whole": [name for name in every if not name.startswith("head")],
    }[kind]


class Judged(NamedTuple):
    """A fold at one `r`: whether each photo keeps the answer of r=0, whether it is right, and the divergence in
    nats.
    """

    agreed: list[bool]
    right: list[bool]
    nats: float


Found = dict[int, tuple[Judged, Judged]]
"""A fold before and after, at each `r`."""


@dataclass(frozen=True)
class Data:
    """Photos to learn from, the same photos for judging, their classes, and further images."""

    squares: Tensor
    seen: Tensor
    labels: Tensor
    more: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="as for tome-server serve")
    parser.add_argument("--weights", help="safetensors file for a timm name")
    parser.add_argument("--data", type=Path, required=True, help="folder with labels.csv and images/")
    parser.add_argument("--more", type=Path, help="folder of further images to learn from, unlabelled")
    parser.add_argument("--variant", default="product", help=f"one or more of: {'; '.join(VARIANTS)}; or all")
    parser.add_argument("--jobs", type=int, default=1, help="processes on each device")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so long")
    args = parser.parse_args()
    names = list(VARIANTS) if args.variant == "all" else [name.strip() for name in args.variant.split(";")]
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"there is no variant {unknown[0]!r}; there are: {'; '.join(VARIANTS)}")

    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    tasks = multiprocessing.get_context("spawn").Queue()
    done = multiprocessing.get_context("spawn").Queue()
    for name in names:
        for fold in range(FOLDS):
            tasks.put((name, fold))
    end = time.monotonic() + 60 * args.minutes
    workers = []
    for device in devices * args.jobs:
        tasks.put(None)
        worker = multiprocessing.get_context("spawn").Process(target=_work, args=(args, device, tasks, done, end))
        worker.start()
        workers.append(worker)
    folds: dict[str, dict[int, tuple[float, Found]]] = {}
    left = len(workers)
    while left:
        said = done.get()
        if said is None:
            left -= 1
            continue
        name, fold, seconds, judged = said
        folds.setdefault(name, {})[fold] = seconds, judged
        if len(folds[name]) == FOLDS:
            print(_table(name, rows(name, folds[name])), flush=True)
    for worker in workers:
        worker.join()
    every = [row for name, found in folds.items() for row in rows(name, found)]
    print(json.dumps({"model": args.model, "device": devices[0], "rows": every}))
    if any(worker.exitcode for worker in workers):
        sys.exit("a process failed; what it has not done is missing above")


def _work(args: argparse.Namespace, device: str, tasks: Any, done: Any, end: float) -> None:
    """Does tasks until there are no more, and then sends None, also after a failure."""
    try:
        _judge_folds(args, device, tasks, done, end)
    finally:
        done.put(None)


def _judge_folds(args: argparse.Namespace, device: str, tasks: Any, done: Any, end: float) -> None:
    torch.set_num_threads(2)
    loaded = load_model(ModelSpec.model_validate({"source": args.model, "weights": args.weights, "tuned": "none"}))
    loaded.merged.to(device)
    with (args.data / "labels.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    files, size = [args.data / "images" / row["file"] for row in listed], loaded.info.preprocessing.input_size
    squares = read_squares(files, loaded.info, MAX_PIXELS).to(device)
    seen = stacked(read_photos(files, loaded.info, MAX_PIXELS), size, squares.device).permute(0, 3, 1, 2)
    labels = torch.tensor([int(row["label"]) for row in listed], device=device)
    more = squares[:0]
    if args.more:
        more = read_squares(choose_photos(args.more, 5000, seed=0), loaded.info, MAX_PIXELS).to(device)
    data = Data(squares, normalised(seen.float() / 255, loaded.info.preprocessing), labels, more)
    while (task := tasks.get()) is not None:
        if time.monotonic() < end:
            name, fold = task
            done.put((name, fold, *judged_fold(VARIANTS[name], loaded, data, fold)))


def judged_fold(variant: Variant, loaded: LoadedModel, data: Data, fold: int) -> tuple[float, Found]:
    """Tunes on all folds but one, and judges on that one; returns the seconds of tuning, and the results."""
    device = data.squares.device
    order = torch.randperm(len(data.squares), generator=torch.Generator().manual_seed(0)).to(device)
    unseen = order[fold::FOLDS]
    learned = torch.cat([order[other::FOLDS] for other in range(FOLDS) if other != fold])
    photos = data.squares[learned[: variant.photos or None]]
    photos = torch.cat([photos, data.more]) if variant.more else photos
    autocast = torch.bfloat16 if device.type == "cuda" else None
    names = learned_names(variant.learned, loaded)
    tuners = {band: Tuner(loaded.merged, variant.recipe, autocast, names) for band in variant.bands}
    start = time.perf_counter()
    for band, tuner in tuners.items():
        learn(tuner, band, photos, loaded, variant.mixed)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    images, true = data.seen[unseen], data.labels[unseen]
    own, *_ = tuners.values()
    unmerged = _answers(own, images, 0, False)
    judged = {}
    for r in LADDER:
        of_band = next((each for (low, high), each in tuners.items() if low <= r <= high), None)
        before = _answers(own, images, r, False)
        both = before, before if of_band is None else _answers(of_band, images, r, True)
        judged[r] = _judged(both[0], unmerged, true), _judged(both[1], unmerged, true)
    return seconds, judged


def _judged(logits: Tensor, unmerged: Tensor, true: Tensor) -> Judged:
    classes = logits.argmax(dim=1)
    agreed, right = (classes == unmerged.argmax(dim=1)).tolist(), (classes == true).tolist()
    return Judged(agreed, right, float(divergence(logits, unmerged)))


def learn(tuner: Tuner, band: tuple[int, int], photos: Tensor, loaded: LoadedModel, mixed: int) -> None:
    """The whole recipe, without judgements."""
    recipe = tuner.recipe
    for step in range(recipe.steps):
        images, r = drawn(step, photos, recipe.batch_size, loaded.info.preprocessing, band, mixed)
        tuner.step(images, r, step / recipe.steps)


def _answers(tuner: Tuner, images: Tensor, r: int, tuned: bool) -> Tensor:
    return torch.cat([tuner.answers(part, r, tuned) for part in images.split(BATCH)])


def rows(name: str, folds: dict[int, tuple[float, Found]]) -> list[dict[str, Any]]:
    """The folds together, at each `r`."""
    made = []
    for r in LADDER:
        parts = [judged[r] for _, judged in folds.values()]
        agreed_before, agreed = ([each for part in parts for each in part[i].agreed] for i in (0, 1))
        right_before, right = ([each for part in parts for each in part[i].right] for i in (0, 1))
        made.append(
            {
                "variant": name,
                "r": r,
                "photos": len(agreed),
                "agreement_before": _percent(agreed_before),
                "agreement": _percent(agreed),
                "gain": _points(paired_difference(agreed, agreed_before)),
                "top1_before": _percent(right_before),
                "top1": _percent(right),
                "top1_gain": _points(paired_difference(right, right_before)),
                "nats": [sum(part[i].nats for part in parts) / len(parts) for i in (0, 1)],
                "seconds": round(sum(seconds for seconds, _ in folds.values()) / len(folds), 1),
            }
        )
    return made


def _percent(hits: Sequence[bool]) -> float:
    return round(100 * sum(hits) / len(hits), 1)


def _points(difference: tuple[float, float, float]) -> list[float]:
    return [round(100 * each, 1) for each in difference]


def _table(name: str, made: Sequence[dict[str, Any]]) -> str:
    high = [row for row in made if row["r"] >= LADDER[3]]
    mean, nats = (sum(row[of][at] for row in high) / len(high) for of, at in (("gain", 0), ("nats", 1)))
    lines = [f"{name}: {mean:+.2f} points of agreement over r of {LADDER[3]} to {LADDER[-1]}, {nats:.3f} nats"]
    lines += [f"{name} ({made[0]['seconds']:.0f} s a fold): r, top-1, agreement, gain in agreement"]
    for row in made:
        gain, low, high = row["gain"]
        lines.append(
            f"  {row['r']:>3}  {row['top1_before']:5.1f} -> {row['top1']:5.1f}  "
            f"{row['agreement_before']:5.1f} -> {row['agreement']:5.1f}  {gain:+.1f} ({low:+.1f} to {high:+.1f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
