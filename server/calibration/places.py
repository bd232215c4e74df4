"""Where the curve of a model lies: beside weights that have a place of their own, else in the state folder."""

from __future__ import annotations

from pathlib import Path

from server.curve import Curve, CurveError, Facts, speed_staleness, staleness
from server.device.models import BUNDLED
from server.keeping import keep, state_folder
from server.model_spec import ModelSpec
from server.types import ModelInfo
from tome_core.whole_file import write_whole

FILE = "curve.json"


def beside(spec: ModelSpec) -> Path | None:
    """The place beside the model; None for one whose weights come from a hub."""
    if spec.weights:
        return Path(f"{spec.weights}.{FILE}")
    if spec.source == "bundled":
        return BUNDLED / FILE
    if spec.source.startswith("local-dir:"):
        return Path(spec.source.removeprefix("local-dir:")) / FILE
    return None


def in_state(name: str, weights: str, state_dir: Path | None) -> Path | None:
    """The place in the state folder, for these weights alone; None where nothing is kept."""
    folder = state_folder(state_dir, "curves")
    return folder / f"{name}-{weights[:12]}.json" if folder else None


def save(curve: Curve, spec: ModelSpec, state_dir: Path | None) -> tuple[Path, str | None]:
    """Writes a curve to its place.

    Returns:
        The file, and why it is not beside the model where it should be.

    Raises:
        SettingsError: There is no place that can be written.
    """
    own = None if spec.source == "bundled" and not spec.weights else beside(spec)
    kept = in_state(spec.name, curve.facts.weights, state_dir)
    return keep(lambda file: write(curve, file), spec.name, own, kept)


def write(curve: Curve, file: Path) -> None:
    """Writes the file as a whole: who reads it meanwhile sees the old one or the new one."""
    write_whole(file, curve.to_json().encode())


def find(spec: ModelSpec, info: ModelInfo, facts: Facts, state_dir: Path | None) -> tuple[Curve | None, list[str]]:
    """The curve that holds for a model as it is served: with speeds of this device before without, new before old.

    Returns:
        The curve, or None; and what is wrong with those that are there and do not hold.
    """
    curves, refusals = [], []
    for file in (beside(spec), in_state(spec.name, facts.weights, state_dir)):
        if file is None:
            continue
        try:
            curve = Curve.from_json(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, CurveError) as error:
            refusals.append(f"{file} cannot be used: {error}")
            continue
        if refusal := staleness(curve, facts) or _misfit(curve, info):
            refusals.append(f"{file} is stale: {refusal}")
        else:
            curves.append(curve)
    best = max(curves, key=lambda curve: (speed_staleness(curve, facts) is None, curve.measured), default=None)
    return best, refusals


def _misfit(curve: Curve, info: ModelInfo) -> str | None:
    """Why a curve cannot be of this model, whose weights it names: another image size, say, or other answers."""
    now = "labels" if info.activation == "sigmoid" else "top1"
    if curve.agreement_of not in ("neighbours", now):
        return f"made with agreement of {curve.agreement_of}, not of {now}"
    for row in curve.rows:
        fits = len(row.r) == info.num_blocks and max(row.r) <= info.max_r
        if not fits or info.token_counts(row.r)[-1] != row.tokens:
            return f"made with a model of another size ({row.tokens} tokens left after r={list(row.r)})"
    return None
