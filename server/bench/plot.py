"""Charts of a benchmark's rows: answers in time, and latency, over the load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from server.bench.rows import LoadRow, name_of

COLOURS = ("#0b6e99", "#d9730d", "#787774", "#6940a5", "#4d9e5f", "#ad1a72")
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "tome"}


def draw(rows: Sequence[LoadRow], title: str, file: Path) -> None:
    """Draws goodput, and the 99th percentile of latency, over the load; one line for each `r`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4), layout="constrained", facecolor="white")
        axes: Sequence[Axes] = figure.subplots(1, 2)
        for i, r in enumerate(dict.fromkeys(row.r for row in rows)):
            mine = sorted((row for row in rows if row.r == r), key=_load)
            drawn: dict[str, Any] = {"color": COLOURS[i % 6], "marker": MARKERS[i % 6], "markersize": 5}
            drawn["label"] = name_of(r)
            axes[0].plot([_load(row) for row in mine], [row.goodput for row in mine], **drawn)
            known = [row for row in mine if row.p99_ms is not None]
            axes[1].plot([_load(row) for row in known], [row.p99_ms or 0.0 for row in known], **drawn)
        unit = "clients" if rows[0].per_s is None else "requests/s"
        axes[0].set(xlabel=unit, title="answered in time, requests/s", ylim=(0, None))
        axes[1].set(xlabel=unit, title="99th percentile of latency, ms", ylim=(0, None))
        for ax in axes:
            ax.grid(axis="y", color="#e5e5e5")
        axes[0].legend(frameon=False, loc="lower right")
        figure.suptitle(title, fontsize=9)
        # Otherwise an SVG would hold the time of day.
        figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)


def _load(row: LoadRow) -> float:
    return row.clients or 0 if row.per_s is None else row.per_s
