"""The speeds of a curve as measured on this device, kept in the state folder for the next start."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from server.calibration.timing import Line
from server.curve import Curve, CurveError, Facts, Timed, speed_staleness, today
from server.dial import Schedule
from server.keeping import state_folder
from tome_core.whole_file import write_whole

logger = logging.getLogger(__name__)


def kept(name: str, curve: Curve, facts: Facts, state_dir: Path | None) -> Curve | None:
    """The curve with the kept speeds; None if there are none for its schedules and these facts."""
    file = _place(name, facts, state_dir)
    if file is None:
        return None
    try:
        before = Curve.from_json(file.read_bytes())
    except (OSError, CurveError):  # they are timed again
        return None
    lines = before.lines
    if speed_staleness(before, facts) is not None or any(row.r not in lines for row in curve.rows):
        return None
    return curve.at(lines.__getitem__, before.max_batch_size, before.speed_from)


def keep(name: str, curve: Curve, lines: Mapping[Schedule, Line], facts: Facts, state_dir: Path | None) -> None:
    """Keeps the speeds of all schedules of a curve. If the file cannot be written, the next start times them again."""
    file = _place(name, facts, state_dir)
    if file is None:
        return
    timed = curve.at(lines.__getitem__, curve.max_batch_size, Timed(facts=facts, measured=today()))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, timed.to_json().encode())
    except OSError as error:
        logger.info("%s: its speeds are timed again at the next start: %s cannot be written (%s)", name, file, error)


def _place(name: str, facts: Facts, state_dir: Path | None) -> Path | None:
    folder = state_folder(state_dir, "speeds")
    return folder / f"{name}-{facts.weights[:12]}.json" if folder else None
