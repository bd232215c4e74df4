"""The tuned numbers of a model: their place, and the choice of those to serve, checked against its weights.

They lie beside weights that have a place of their own, else in the state folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from server.errors import SettingsError
from server.keeping import keep, state_folder
from server.model_config import TUNED_SUFFIX
from server.model_spec import ModelSpec
from tome_core import MergedViT
from tome_core.tuned import Tuned, TunedError, fingerprint

logger = logging.getLogger(__name__)

SUFFIX = TUNED_SUFFIX


class TunedFile(NamedTuple):
    """Tuned numbers that fit a model, their file, and its sha256."""

    tuned: Tuned
    file: Path
    sha256: str


def beside(spec: ModelSpec, weights_file: Path | None) -> Path | None:
    """The place beside the weights.

    None for random weights and weights of a hub; also for the bundled model, unless a file is there.
    """
    if weights_file is None:
        return None
    file = weights_file.with_name(weights_file.stem + SUFFIX)
    if spec.weights or spec.source.startswith("local-dir:"):
        return file
    return file if spec.source == "bundled" and file.exists() else None


def in_state(name: str, weights: str, state_dir: Path | None) -> Path | None:
    """The place in the state folder; None if nothing is kept.

    Args:
        name: Name of the model.
        weights: `fingerprint` of the model in float32.
        state_dir: The state folder.
    """
    folder = state_folder(state_dir, "tuned")
    return folder / f"{name}-{weights[:12]}.safetensors" if folder else None


def places(spec: ModelSpec, weights: str, weights_file: Path | None, state_dir: Path | None) -> list[Path]:
    """The places where `save` may write tuned numbers, the first choice first.

    Args:
        spec: The model.
        weights: `fingerprint` of the model in float32.
        weights_file: Its weights.
        state_dir: The state folder.
    """
    return [place for place in (_own(spec, weights_file), in_state(spec.name, weights, state_dir)) if place]


def can_be_written(file: Path) -> bool:
    """Whether a file can be written to this place; its name may be too long. Makes its folder."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f"{file.name}."):
            return True
    except OSError:
        return False


def save(tuned: Tuned, spec: ModelSpec, weights_file: Path | None, state_dir: Path | None) -> tuple[Path, str | None]:
    """Writes tuned numbers to the place where `find` finds them.

    Returns:
        The file, and why it is not beside the weights if it should be.

    Raises:
        SettingsError: No place is writable.
    """
    own, kept = _own(spec, weights_file), in_state(spec.name, tuned.weights["float32"], state_dir)
    file, refusal = keep(tuned.save, spec.name, own, kept)
    if file == own:
        _forget(kept)
    return file, refusal


def read(file: Path, merged: MergedViT, weights: str | None = None) -> TunedFile:
    """Reads tuned numbers for a model.

    Args:
        file: A file of `save`.
        merged: The model, in float32.
        weights: Its `fingerprint`, if it is known.

    Raises:
        SettingsError: The file cannot be read, holds no tuned numbers, or holds those of another model or other
            weights.
    """
    try:
        with file.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        tuned = Tuned.load(file)
    except FileNotFoundError:
        raise SettingsError(f"there is no file of tuned numbers {file}") from None
    except TunedError as error:
        raise SettingsError(str(error)) from None
    except (OSError, ValueError) as error:  # ValueError: not a possible path
        raise SettingsError(f"{file} cannot be read: {getattr(error, 'strerror', error)}") from None
    try:
        tuned.check(merged.model, merged.family, weights)
    except TunedError as error:
        raise SettingsError(f"{file} is stale: {error}") from None
    return TunedFile(tuned, file, sha256)


def find(
    spec: ModelSpec, merged: MergedViT, weights_file: Path | None, state_dir: Path | None
) -> tuple[TunedFile | None, list[str]]:
    """The tuned numbers that `save` has written: those of the state folder before those beside the weights.

    The weights are hashed at most once, and only if there is a file to compare them with.

    Returns:
        The parameters, or None; and the errors of files that cannot be used.
    """
    refusals: list[str] = []
    weights = kept = None
    if weights_file is not None and _may_be_in_state(spec.name, state_dir):
        weights = fingerprint(merged.model)
        kept = in_state(spec.name, weights, state_dir)
    for file in (kept, beside(spec, weights_file)):
        if file is None or not os.path.lexists(file):
            continue
        weights = weights or fingerprint(merged.model)
        try:
            return read(file, merged, weights), refusals
        except SettingsError as error:
            refusals.append(str(error))
    return None, refusals


def served(spec: ModelSpec, merged: MergedViT, weights_file: Path | None, state_dir: Path | None) -> TunedFile | None:
    """The tuned numbers that a model is served with, by its settings: "none", a file, or the result of `find`.

    A file that was found and cannot be used is logged.

    Raises:
        SettingsError: The file that the settings name cannot be used.
    """
    if spec.tuned == "none":
        return None
    if spec.tuned not in (None, "auto"):
        return read(Path(spec.tuned), merged)
    found, refusals = find(spec, merged, weights_file, state_dir)
    for refusal in refusals:
        logger.error("model %s: tuned numbers are not used: %s", spec.name, refusal)
    return found


def _forget(kept: Path | None) -> None:
    """Removes an older file of the state folder, which `find` would prefer."""
    try:
        if kept is not None:
            kept.unlink(missing_ok=True)
    except OSError as error:
        raise SettingsError(f"{kept} cannot be removed ({error.strerror}), and would be served instead") from None


def _own(spec: ModelSpec, weights_file: Path | None) -> Path | None:
    """The place beside the weights, if `save` may write there; never for the bundled model."""
    return None if spec.source == "bundled" and not spec.weights else beside(spec, weights_file)


def _may_be_in_state(name: str, state_dir: Path | None) -> bool:
    """Whether the state folder has tuned numbers of a model of this name."""
    folder = state_folder(state_dir, "tuned")
    return folder is not None and any(folder.glob(f"{name}-*.safetensors"))
