"""Draws a curve: agreement against speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from server.curve import AgreementOf, Curve
from server.dial import r_of, text_of

STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "tome"}
NAMES: dict[AgreementOf, str] = {
    "top1": "same answer as at r=0",
    "labels": "same labels as at r=0",
    "neighbours": "nearest neighbours of r=0 that are found",
}


def draw(curve: Curve, file: Path) -> None:
    """Draws agreement with r=0, its interval, and top-1 if it is known, over images/s; one point a row."""
    speeds = [row.images_per_s or 0.0 for row in curve.rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 4), layout="constrained", facecolor="white")
        ax: Axes = figure.subplots()
        for row, speed in zip(curve.rows, speeds, strict=True):
            low, high = row.agreement_interval
            ax.vlines(speed, 100 * low, 100 * high, color="#0b6e99", linewidth=1)
            label = f"r={text_of(r_of(row.r))}" if len(set(row.r)) == 1 else "list"
            ax.annotate(label, (speed, 100 * row.agreement), (4, 5), textcoords="offset points", fontsize=8)
        shares = [100 * row.agreement for row in curve.rows]
        ax.plot(speeds, shares, "o", color="#0b6e99", label=NAMES[curve.agreement_of])
        labelled = [
            (speed, 100 * row.top1) for speed, row in zip(speeds, curve.rows, strict=True) if row.top1 is not None
        ]
        if labelled:
            ax.plot(*zip(*labelled, strict=True), "s", color="#d9730d", label="top-1")
        title = f"{curve.model}, {curve.facts.device}, {curve.facts.precision}"
        ax.set(xlabel=f"images/s in batches of {curve.max_batch_size}", ylabel="% of photos", title=title)
        ax.grid(axis="y", color="#e5e5e5")
        ax.legend(frameon=False, loc="lower left")
        # Otherwise an SVG would hold the time of day.
        figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
