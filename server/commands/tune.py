"""`tome-server tune`: recover the accuracy that merging costs, from photos without labels."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from server.commands.output import check_place, spare_others, tell
from server.commands.progress import clock
from server.commands.stopping import Stop
from server.errors import SettingsError
from server.images.photos import choose_photos
from server.model_spec import ModelSpec
from server.settings import Settings
from server.tuning import FEWEST

if TYPE_CHECKING:
    from server.tuning.judging import Gain
    from server.tuning.learning import Progress
    from server.types import ModelInfo
    from tome_core.tuned import Tuned

HELP = "tune norms and biases for high r, from photos without labels; r=0 stays as it is"
SETTINGS: tuple[str, ...] = ("model", "weights", "device", "threads", "state_dir")
DEFAULT_MINUTES, MOST_MINUTES = 25.0, 10_000.0
WIDTH = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "The model learns to give at each r of a band the answer of r=0. Only norms and biases move. They are kept in "
        "a small file beside the weights, which tome-server serve finds; every r outside the band stays as it is. "
        "Ctrl-C keeps the best so far, and the same command goes on from there."
    )
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="photos like those to be served")
    parser.add_argument(
        "--band", metavar="LOW..HIGH", help="the r to tune for (default: 12..18 for 196 patches in 12 blocks)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=DEFAULT_MINUTES,
        metavar="M",
        help=f"the most minutes to learn for (default: {DEFAULT_MINUTES:g}; a GPU takes fewer)",
    )
    parser.add_argument("--limit", type=int, default=1000, metavar="N", help="the most photos to use (default: 1000)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="file for the numbers (default: beside the weights)"
    )


def run(settings: Settings, args: argparse.Namespace) -> int:
    _check(args)
    spec = settings.specs()[0].model_copy(update={"tuned": "none"})
    tell(f"loading {spec.name}")  # before torch is imported, which takes seconds

    from server.device.models import load_model
    from server.device.runner import device_of, on
    from server.device.torch_backend import set_threads
    from server.tuning import bands, photos
    from server.tuning.session import Session

    set_threads(settings.threads)
    device = device_of(settings.device)
    loaded = load_model(spec, settings.state_dir)
    _check_answers(loaded.info)
    band = bands.default(loaded.info) if args.band is None else bands.parse(args.band, loaded.info)
    taken = photos.read(args.images, args.limit, loaded.info, settings.max_image_pixels)
    with on(device):
        session = Session(loaded, spec, device, band, taken, args.output, settings.state_dir)
        tell(
            f"{loaded.info.name} at r={band[0]}..{band[1]} on {device}: {len(taken.learned)} photos to learn from, "
            f"{len(taken.judges)} that judge"
        )
        if session.progress.step:
            tell(f"going on after step {session.progress.step}")
        with Stop("stopping after this step; what was learned is judged and kept") as stop:
            session.learn(60 * args.minutes, _line(band), stop)
        tell("")
        tuned, gain = session.result()
    _print_table(gain)
    mean, low, high = (100 * each for each in (gain.mean, *gain.interval))
    found = f"agreement at r={band[0]}..{band[1]} gains {mean:+.1f} points ({low:+.1f} to {high:+.1f})"
    kept = _saved(tuned, spec, loaded.weights, settings.state_dir, args.output) if gain.is_sure else None
    if kept is None:
        tell(f"{found}: not beyond its interval, so nothing is written; more photos or minutes may help")
    else:
        tell(f"{found}; kept in {kept}")
        if args.output:
            tell(f"to serve the model with it: --tuned {shlex.quote(str(kept))}")
        tell("a curve measured before is stale now; run tome-server calibrate")
    if stop.is_asked:
        tell("stopped; the same command goes on from here" if session.can_go_on else "stopped")
    else:
        session.forget()
    print(json.dumps({"written": kept and str(kept), **tuned.about}))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses arguments that are wrong for any model."""
    if not 0 < args.minutes <= MOST_MINUTES:
        raise SettingsError(f"--minutes is {args.minutes:g}; it must be above 0, and {MOST_MINUTES:g} at most")
    if args.limit < FEWEST:
        raise SettingsError(f"--limit is {args.limit}; it must be {FEWEST} or more")
    if output := args.output:
        check_place("-o", output)
        spare_others(output, _load_tuned, "holds no tuned numbers")
    choose_photos(args.images, args.limit, seed=0, least=FEWEST)  # they are read once the model is loaded


def _load_tuned(file: Path) -> object:
    from tome_core.tuned import Tuned

    return Tuned.load(file)


def _check_answers(info: ModelInfo) -> None:
    """Refuses models whose answer is not one class, because the class at r=0 is learned and judged."""
    if not info.labels:
        raise SettingsError(f"{info.name} has no classifier; tune learns from the classes that a model names at r=0")
    if info.activation == "sigmoid":
        raise SettingsError(
            f"{info.name} is a multi-label model; tune learns from the one class that a model names at r=0"
        )


def _saved(tuned: Tuned, spec: ModelSpec, weights: Path | None, state_dir: Path | None, output: Path | None) -> Path:
    """Writes the tuned numbers to `output`, or else to the model's own place; returns the file."""
    from server.device import tuned_file

    if output is None:
        file, refusal = tuned_file.save(tuned, spec, weights, state_dir)
        if refusal:
            tell(refusal)
        return file
    try:
        tuned.save(output)
    except OSError as error:
        raise SettingsError(f"-o is {output}: {error.strerror}") from None
    return output


def _line(band: tuple[int, int]) -> Callable[[Progress, float], None]:
    """Shows the progress: on a terminal in one line that changes, otherwise in a line for each judgement."""
    is_watched, told = sys.stderr.isatty(), 0

    def show(progress: Progress, share: float) -> None:
        nonlocal told
        if not is_watched and progress.glances == told:
            return
        told = progress.glances
        filled = int(share * WIDTH)
        left_s = progress.seconds * (1 - share) / share
        judged = f"loss {progress.loss:.3f}, agreement {progress.agreement:.1%} at r={sum(band) // 2}, " if told else ""
        text = f"[{'#' * filled:<{WIDTH}}] {share:4.0%}  {judged}{clock(left_s)} left"
        print(f"\r{text:<96}" if is_watched else text, end="" if is_watched else "\n", file=sys.stderr, flush=True)

    return show


def _print_table(gain: Gain) -> None:
    """Prints the agreement at each `r`, before and after."""
    print(f"{'r':>3} {'agree %, before':>16} {'tuned':>6} {'gain':>6}")
    for r, before, after in zip(gain.r, gain.before, gain.after, strict=True):
        print(f"{r:>3} {100 * before:>16.1f} {100 * after:>6.1f} {100 * (after - before):>+6.1f}")
