"""`tome-server calibrate`: measure the speed and agreement of each `r` here, and store them beside the model."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from server.commands.output import check_place, spare_others, tell
from server.commands.progress import Bar
from server.dial import RSetting, parse_setting, r_of, text_of
from server.errors import InvalidError, SettingsError
from server.images.photos import choose_photos
from server.settings import Settings

if TYPE_CHECKING:
    from server.curve import AgreementOf, Curve, CurveRow

HELP = "measure what each r costs and keeps on this machine, for r=auto and for you"
SETTINGS: tuple[str, ...] = (
    "model",
    "weights",
    "tuned",
    "device",
    "precision",
    "backend",
    "threads",
    "max_batch_size",
    "state_dir",
)
COLUMNS: dict[AgreementOf, tuple[str, ...]] = {
    "top1": ("agree", "top-1 %"),
    "labels": ("labels agree", ""),
    "neighbours": ("neighbours", "same r %", "cosine"),
}
"""The columns of the table for each kind of agreement."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measures images/s, the seconds of a batch as a + b n, and how many photos keep the answer of r=0, which needs "
        "no labels. The answer is the likeliest class; of a model with several labels it is all labels with a score of "
        "0.5 or more. Of a model without classes it measures how many of a photo's ten nearest neighbours stay. A "
        "server finds the result beside the model, or in the state folder, and r=auto uses it."
    )
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="photos like those to be served")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="CSV table with columns file and label (a class index), for top-1"
    )
    parser.add_argument(
        "--neighbours",
        action="store_true",
        help="measure neighbours even if the model has classes, because its vectors serve a search",
    )
    # Not the setting r, which is one r.
    parser.add_argument(
        "--r",
        dest="ladder",
        nargs="+",
        metavar="R",
        help="each r to measure beside r=0: a number, or a list like 16,14,12 (default: numbers up to half of the "
        "arithmetic)",
    )
    parser.add_argument("--limit", type=int, default=1000, metavar="N", help="the most photos to use (default: 1000)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="file for the curve (default: beside the model)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve into this file, .svg or .png")


def run(settings: Settings, args: argparse.Namespace) -> int:
    ladder, spec = _check(args), settings.specs()[0]
    files = choose_photos(args.images, args.limit, seed=0)
    tell(f"loading {spec.name}")  # before torch is imported, which takes seconds

    from server.calibration import agreement, places
    from server.calibration.facts import facts_of
    from server.calibration.labels import read_labels
    from server.calibration.measure import measure
    from server.calibration.photos import read_photos
    from server.calibration.timing import schedules as default_ladder
    from server.curve import Curve, today
    from server.device.backend import BackendOptions
    from server.device.models import load_model
    from server.device.runner import Runner
    from server.device.torch_backend import set_threads

    set_threads(settings.threads)
    loaded = load_model(spec, settings.state_dir)
    info, batch = loaded.info, settings.max_batch_size
    schedules = [info.schedule(r) for r in ladder] or default_ladder(loaded)
    of: AgreementOf = "neighbours" if args.neighbours else agreement.default_for(info)
    if args.labels and of != "top1":
        raise SettingsError(
            f"--labels measures top-1, of one right class for each photo; the agreement here is of {of}"
        )
    if of == "neighbours" and len(files) < agreement.FEWEST_PHOTOS:
        raise SettingsError(
            f"{len(files)} photos are too few to measure a photo's {agreement.NEAREST} nearest neighbours; "
            f"it takes {agreement.FEWEST_PHOTOS} or more"
        )
    labels = read_labels(args.labels, files, args.images, len(info.labels)) if args.labels else [None] * len(files)
    tell(f"reading {len(files):,} photos")
    photos = read_photos(files, info, settings.max_image_pixels)
    options = BackendOptions(settings.backend, settings.threads, settings.cache_dir(), batch)
    runner = Runner({info.name: loaded}, settings.device, settings.precision, options)
    facts = facts_of(loaded, runner)
    if facts is None:
        raise SettingsError(
            f"{info.name} has random weights, which differ at every start; a curve needs a file of weights"
        )
    rows = measure(loaded, runner, list(dict.fromkeys(schedules)), photos, labels, batch, of, Bar())
    curve = Curve(
        model=info.name,
        facts=facts,
        measured=today(),
        photos=len(photos),
        max_batch_size=batch,
        agreement_of=of,
        rows=tuple(rows),
    )
    _print_table(curve)
    if args.output:
        try:
            places.write(curve, args.output)
        except OSError as error:
            raise SettingsError(f"-o is {args.output}: {error.strerror}") from None
        kept = args.output
    else:
        kept, refusal = places.save(curve, spec, settings.state_dir)
        if refusal:
            tell(refusal)
    tell(f"kept in {kept}")
    if args.plot:
        _draw(curve, args.plot)
    print(curve.model_dump_json())
    return 0


def _check(args: argparse.Namespace) -> list[RSetting]:
    """Refuses arguments that are wrong for any model. Returns each `r` to measure; none for the default ladder."""
    from server.curve import Curve

    if args.limit < 2:
        raise SettingsError(f"--limit is {args.limit}; it must be 2 or more")
    if args.output:
        check_place("-o", args.output)
        spare_others(args.output, lambda file: Curve.from_json(file.read_bytes()), "holds no curve")
    if args.plot:
        check_place("--plot", args.plot)
        if importlib.util.find_spec("matplotlib") is None:
            raise SettingsError("--plot needs matplotlib; install it with: pip install matplotlib")
    try:
        return [0, *map(parse_setting, args.ladder)] if args.ladder else []
    except InvalidError as error:
        raise SettingsError(f"--r: {error.message}") from None


def _print_table(curve: Curve) -> None:
    facts = curve.facts
    print(
        f"{curve.model} on {facts.device}, {facts.backend} in {facts.precision}, {curve.photos} photos, "
        f"batches of up to {curve.max_batch_size}"
    )
    if curve.agreement_of == "neighbours":
        print(
            "neighbours: of a photo's ten nearest at r=0, the share found by its vector at r in an index at r=0; "
            "same r: in one at r, too"
        )
    agree, *more = COLUMNS[curve.agreement_of]
    print(
        f"{'tokens':>6} {'GFLOPs':>8} {'images/s':>9} {'speed-up':>8} {'batch of n, ms':>17} "
        f"{f'{agree} % (95 %)':>25} {' '.join(f'{name:>8}' for name in more)}  r"
    )
    slowest = curve.rows[0].images_per_s or 0.0
    for row in curve.rows:
        assert row.line is not None and row.images_per_s is not None, "it was measured just now"
        low, high = (100 * end for end in row.agreement_interval)
        agree = f"{100 * row.agreement:.1f} ({low:.1f} to {high:.1f})"
        batch_ms = "{:.1f} + {:.2f} n".format(*(1e3 * term for term in row.line))
        gflops = "" if row.gflops is None else f"{row.gflops:.3f}"
        print(
            f"{row.tokens:>6} {gflops:>8} {row.images_per_s:>9.1f} {row.images_per_s / slowest:>7.2f}x {batch_ms:>17} "
            f"{agree:>25} {' '.join(f'{text:>8}' for text in _more(row))}  {text_of(r_of(row.r))}"
        )


def _more(row: CurveRow) -> list[str]:
    """The cells of the columns after the agreement."""
    if row.neighbours is not None:
        return [f"{100 * row.neighbours.same_index:.1f}", f"{row.neighbours.cosine:.4f}"]
    return ["" if row.top1 is None else f"{100 * row.top1:.1f}"]


def _draw(curve: Curve, file: Path) -> None:
    from server.calibration.plot import draw

    try:
        draw(curve, file)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not write
        raise SettingsError(f"--plot is {file}: {error}") from None
