"""Where the curve of a model is stored: beside its weights if they are local, otherwise in the state folder."""

from __future__ import annotations

from pathlib import Path

from server.curve import Curve, CurveError, Facts, speed_staleness, staleness
from server.keeping import keep, state_folder
from server.model_config import BUNDLED
from server.model_spec import ModelSpec
from server.types import ModelInfo
from tome_core.whole_file import write_whole

FILE = "curve.json"


def beside(spec: ModelSpec) -> Path | None:
    """The place beside the model; None if its weights come from a hub."""
    if spec.weights:
        return Path(f"{spec.weights}.{FILE}")
    if spec.source == "bundled":
        return BUNDLED / FILE
    if spec.source.startswith("local-dir:"):
        return Path(spec.source.removeprefix("local-dir:")) / FILE
    return None


def in_state(name: str, weights: str, state_dir: Path | None) -> Path | None:
    """The place in the state folder for exactly these weights; None without a state folder."""
    folder = state_folder(state_dir, "curves")
    return folder / f"{name}-{weights[:12]}.json" if folder else None


def save(curve: Curve, spec: ModelSpec, state_dir: Path | None) -> tuple[Path, str | None]:
    """Writes a curve to its place.

    Returns:
        The file, and the reason if it could not be written beside the model.

    Raises:
        SettingsError: No place is writable.
    """
    own = None if spec.source == "bundled" and not spec.weights else beside(spec)
    kept = in_state(spec.name, curve.facts.weights, state_dir)
    return keep(lambda file: write(curve, file), spec.name, own, kept)


def write(curve: Curve, file: Path) -> None:
    """Replaces the file as a whole: a reader sees the old file or the new one."""
    write_whole(file, curve.to_json().encode())


def find(spec: ModelSpec, info: ModelInfo, facts: Facts, state_dir: Path | None) -> tuple[Curve | None, list[str]]:
    """Finds the curve of a model as it is served. A curve with speeds of this device comes first, then the newest.

    Returns:
        The curve or None, and the faults of the curves that do not fit.
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
    """Why a curve that names this model's weights does not fit, for example another image size or other answers."""
    now = "labels" if info.activation == "sigmoid" else "top1"
    if curve.agreement_of not in ("neighbours", now):
        return f"made with agreement of {curve.agreement_of}, not of {now}"
    for row in curve.rows:
        fits = len(row.r) == info.num_blocks and max(row.r) <= info.max_r
        if not fits or info.token_counts(row.r)[-1] != row.tokens:
            return f"made with a model of another size ({row.tokens} tokens left after r={list(row.r)})"
    return None
