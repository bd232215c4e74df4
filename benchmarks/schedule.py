"""Is there a better list of `r` than a constant one? Searches for the list that changes answers least at a cost.

python -m benchmarks.schedule --model NAME --weights FILE --tuned none --images FOLDER --speedup 1.7 2.0
python -m benchmarks.schedule ... --cost latency    # faster in milliseconds on this device, not in arithmetic

It finds how many tokens each block should merge, the same for every image, so that answers differ least from those at
r=0. It needs no labels: half of the photos serve to choose, the other half to report. It ends with a verdict for each
speed-up: the list is recommended only where it gains agreement beyond its 95 % interval, else the constant r. The last
line is JSON: {"rows": [{"speedup", "kind", "r", "cost", "agreement", "interval", "distance", "gain"}], "verdicts":
[{"speedup", "take", "why"}]}; `gain` is the agreement of the found list less this one's, with the ends of its interval.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.schedule_parts.calibration import Calibration
from benchmarks.schedule_parts.latency import Latency, measure
from benchmarks.schedule_parts.rows import Kind, ScheduleRow, judge, print_table
from benchmarks.schedule_parts.search import Space, search
from server.calibration.photos import read_photos
from server.commands.output import tell
from server.device.models import LoadedModel, load_model
from server.device.runner import Runner
from server.device.torch_backend import set_threads
from server.dial import Schedule, text_of
from server.errors import ServerError, SettingsError
from server.images.photos import choose_photos
from server.intervals import paired_difference, wilson
from server.settings import Settings
from server.settings_sources import load_settings
from server.types import ModelInfo
from tome_core.cost import flops
from tome_core.families.dimensions import dimensions
from tome_core.families.family import UnsupportedModelError

SETTINGS = ("weights", "tuned", "device", "precision", "threads", "max_batch_size", "state_dir")
PARTS = 4  # a trial looks at a quarter of the photos to choose on
LEAST_PHOTOS = 2 * PARTS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="photos like those to be served")
    parser.add_argument(
        "--speedup", required=True, type=float, nargs="+", metavar="X", help="times faster than timm's model; several"
    )
    parser.add_argument("--cost", choices=("flops", "latency"), default="flops", help="what to be faster in")
    parser.add_argument("--limit", type=int, default=1000, metavar="N", help="the most photos to use (default: 1000)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of the search (default: 3)")
    parser.add_argument("--trials", type=int, default=64, metavar="N", help="schedules tried a round (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the halves and the search (default: 0)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSON file to write as well")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    parser.add_argument("--model", action="append", metavar="VALUE", help="as for tome-server serve (default: bundled)")
    for name in SETTINGS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help="as for tome-server serve")
    args = parser.parse_args()
    try:
        settings = load_settings({name: getattr(args, name) for name in ("model", *SETTINGS)}, args.config)
        run(settings, args)
    except (SettingsError, ServerError) as error:
        raise SystemExit(f"benchmarks.schedule: {error}") from None


def run(settings: Settings, args: argparse.Namespace) -> None:
    """Searches at each speed-up, and prints what was found."""
    for name, least in (("limit", LEAST_PHOTOS), ("rounds", 1), ("trials", PARTS)):
        if getattr(args, name) < least:
            raise SettingsError(f"--{name} is {getattr(args, name)}; it must be {least} or more")
    set_threads(settings.threads)
    loaded = load_model(settings.specs()[0], settings.state_dir)
    info = loaded.info
    files = choose_photos(args.images, args.limit, args.seed, LEAST_PHOTOS)
    photos = read_photos(files, info, settings.max_image_pixels)
    runner = Runner({info.name: loaded}, settings.device, settings.precision)
    calibration = Calibration(runner, loaded, photos, settings.max_batch_size)
    choose_on, report_on = range(len(photos) // 2), range(len(photos) // 2, len(photos))
    tell(f"{info.name}: {len(choose_on)} photos to choose on, {len(report_on)} to report on")

    cost, timm_cost = _flops(loaded) if args.cost == "flops" else _latency(calibration, info, args.seed)
    rows, verdicts = [], []
    for speedup in args.speedup:
        budget = timm_cost / speedup
        kinds = _schedules(loaded, calibration, choose_on, cost, budget, speedup, args)
        measured = _rows(kinds, speedup, calibration, report_on, cost if args.cost == "flops" else None)
        verdicts.append(judge(*measured))
        rows += measured
    unit = "GFLOPs" if args.cost == "flops" else f"ms/{min(settings.max_batch_size, len(photos))}"
    print_table(rows, unit)
    print(*verdicts, sep="\n")
    result = {
        "model": info.name,
        "cost": unit,
        "timm_cost": timm_cost,
        "photos_to_choose_on": len(choose_on),
        "photos_to_report_on": len(report_on),
        "seed": args.seed,
        "rows": [asdict(row) for row in rows],
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
    if args.output:
        try:
            args.output.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise SettingsError(f"-o is {args.output}: {error.strerror}") from None
    print(json.dumps(result))


def _flops(loaded: LoadedModel) -> tuple[Callable[[Schedule], float], float]:
    """GFLOPs of a schedule, and of timm's model."""
    try:
        counted = dimensions(loaded.merged)
    except UnsupportedModelError as error:
        raise SettingsError(f"model {loaded.info.name}: {error}; use --cost latency") from None
    of_timm = flops(replace(counted, prefix_only_last=False), (0,) * counted.num_blocks) / 1e9
    return lambda schedule: flops(counted, schedule) / 1e9, of_timm


def _latency(calibration: Calibration, info: ModelInfo, seed: int) -> tuple[Callable[[Schedule], float], float]:
    """Milliseconds of a batch under a schedule, and with timm's model."""
    of_timm = measure(calibration.seconds, [None])[None]
    latency = Latency(calibration.seconds, info, seed)
    tell(f"latency is predicted to {latency.error:.1%} on the schedules that were measured")
    return lambda schedule: 1e3 * latency(schedule), 1e3 * of_timm


def _schedules(
    loaded: LoadedModel,
    calibration: Calibration,
    choose_on: Sequence[int],
    cost: Callable[[Schedule], float],
    budget: float,
    speedup: float,
    args: argparse.Namespace,
) -> dict[Kind, Schedule]:
    """The schedule found within a budget, and the two that it must beat."""
    info = loaded.info
    space = Space(cost, budget, info.num_blocks, info.num_tokens, info.num_prefix_tokens)
    # What the last block merges is worth nothing where only prefix tokens are read after it.
    merging_blocks = info.num_blocks - loaded.merged.family.reads_prefix_only(loaded.merged.model)
    start = (1.0,) * merging_blocks
    even = space.schedule(start)
    constants = [(r,) * info.num_blocks for r in range(info.max_r + 1)]
    constant = next((schedule for schedule in constants if cost(schedule) <= budget), None)
    if even is None or constant is None:
        raise SettingsError(f"--speedup is {speedup:g}; merging the most in every block does not reach it")

    def loss(schedule: Schedule, part: int) -> float:
        return max(calibration.distance(schedule, choose_on[part::PARTS]), 1e-9)

    finalists = [even]
    rounds = search(loss, space, start, rounds=args.rounds, trials=args.trials, parts=PARTS, seed=args.seed)
    for number, (schedule, fit) in enumerate(rounds, start=1):
        tell(f"{speedup:g}x, round {number} of {args.rounds}: r={text_of(schedule)} (surrogate explains {fit:.0%})")
        finalists.append(schedule)
    found = min(dict.fromkeys(finalists), key=lambda schedule: calibration.distance(schedule, choose_on))
    return {"found": found, "even": even, "constant": constant}


def _rows(
    kinds: dict[Kind, Schedule],
    speedup: float,
    calibration: Calibration,
    report_on: Sequence[int],
    cost: Callable[[Schedule], float] | None,
) -> list[ScheduleRow]:
    """Agreement on photos that the search has not seen; cost None means latency, measured once more."""
    costs = measure(calibration.seconds, list(dict.fromkeys(kinds.values()))) if cost is None else {}
    agreements = {kind: calibration.agreements(schedule, report_on) for kind, schedule in kinds.items()}
    rows = []
    for kind, schedule in kinds.items():
        agreed = agreements[kind]
        rows.append(
            ScheduleRow(
                speedup=speedup,
                kind=kind,
                r=schedule,
                cost=cost(schedule) if cost else 1e3 * costs[schedule],
                agreement=sum(agreed) / len(agreed),
                interval=wilson(sum(agreed), len(agreed)),
                distance=calibration.distance(schedule, report_on),
                gain=None if kind == "found" else paired_difference(agreements["found"], agreed),
            )
        )
    return rows


if __name__ == "__main__":
    main()
