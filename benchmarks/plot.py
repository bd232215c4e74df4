"""Charts of benchmark rows: methods over `r`, the effect of each choice, the dial under load, speed over `r`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0b6e99", "#d9730d", "#787774", "#6940a5", "#4d9e5f", "#ad1a72")
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "tome"}
Rows = Sequence[Mapping[str, Any]]


def draw_methods(rows: Rows, file: Path) -> None:
    """Top-1 and agreement with r=0 over `r`, one line a method; all start from the row of r=0."""
    unmerged, *others = rows
    methods = list(dict.fromkeys(row["method"] for row in others))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4), layout="constrained", facecolor="white")
        axes: Sequence[Axes] = figure.subplots(1, 2)
        for ax, key, title in zip(axes, ("top1", "agreement"), ("top-1, %", "same answer as at r=0, %"), strict=True):
            for i, method in enumerate(methods):
                line = sorted((row for row in [unmerged, *others] if row["method"] in (method, "none")), key=by_r)
                x, y = [row["r"] for row in line], [100 * row[key] for row in line]
                ax.plot(x, y, color=COLOURS[i % 6], marker=MARKERS[i % 6], markersize=5, label=method)
            ax.set_xticks(sorted({row["r"] for row in rows}))
            ax.set(xlabel="r, tokens fewer after each block", title=title)
            ax.grid(axis="y", color="#e5e5e5")
        axes[0].legend(frameon=False, loc="lower left")
        save(figure, file)


def draw_differences(rows: Rows, file: Path) -> None:
    """The difference of each choice to token merging in top-1, with its 95 % interval, one colour an `r`."""
    compared = [row for row in rows if row["to_tome"] and row["method"] != "none"]
    methods = list(dict.fromkeys(row["method"] for row in compared))
    ladder = sorted({row["r"] for row in compared})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 0.8 + 0.42 * len(methods)), layout="constrained", facecolor="white")
        ax: Axes = figure.subplots()
        ax.axvline(0, color="#37352f", linewidth=1)
        for i, r in enumerate(ladder):
            there = [row for row in compared if row["r"] == r]
            y = [methods.index(row["method"]) + 0.22 * (i - (len(ladder) - 1) / 2) for row in there]
            middle, low, high = zip(*(row["to_tome"] for row in there), strict=True)
            colour = COLOURS[i % 6]
            ax.hlines(y, [100 * v for v in low], [100 * v for v in high], color=colour, linewidth=1.5)
            ax.plot([100 * v for v in middle], y, MARKERS[i % 6], color=colour, markersize=5, label=f"r={r}")
        ax.set_yticks(range(len(methods)), methods)
        ax.invert_yaxis()
        ax.set_xlabel("difference to token merging in top-1, points, with 95 % intervals")
        ax.grid(axis="x", color="#e5e5e5")
        figure.legend(frameon=False, loc="outside upper right", ncols=len(ladder))
        save(figure, file)


def draw_dial(rows: Rows, file: Path) -> None:
    """Goodput and top-1 of the answers over the load, one line a policy; simulated values are dotted."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4), layout="constrained", facecolor="white")
        goodput, top1 = figure.subplots(1, 2)
        for i, policy in enumerate(policies):
            line = [row for row in rows if row["policy"] == policy]
            x, look = [row["load"] for row in line], {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 5}
            goodput.plot(x, [100 * row["goodput"] for row in line], label=policy, **look)
            top1.plot(x, [100 * row["top1"] for row in line], **look)
            known = [row for row in line if row["simulated"]]
            shares = [100 * row["simulated"]["goodput"] for row in known]
            goodput.plot([row["load"] for row in known], shares, ":", color=COLOURS[i], linewidth=1)
        for ax, title in ((goodput, "answered in time, %"), (top1, "top-1 of those, %")):
            ax.set(xlabel="load, times what r=0 can serve", title=title)
            ax.grid(axis="y", color="#e5e5e5")
        goodput.set_ylim(0, 102)
        goodput.legend(frameon=False, loc="lower left")
        save(figure, file)


def draw_forward(rows: Rows, file: Path) -> None:
    """Images/s over `r`, one line an implementation, one panel a batch size; implementations without merging are
    dashed.
    """
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    names = list(dict.fromkeys(row["impl"] for row in rows))
    ladder = sorted({row["r"] for row in rows})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4 * len(batches), 3.4), layout="constrained", facecolor="white")
        panels: Sequence[Axes] = figure.subplots(1, len(batches), squeeze=False)[0]
        for ax, batch in zip(panels, batches, strict=True):
            for i, name in enumerate(names):
                line = sorted((row for row in rows if (row["impl"], row["batch"]) == (name, batch)), key=by_r)
                speeds, colour = [row["images_per_s"] for row in line], COLOURS[i % 6]
                if len(line) == 1:
                    ax.axhline(speeds[0], color=colour, linestyle="--", linewidth=1, label=name)
                else:
                    ax.plot([row["r"] for row in line], speeds, color=colour, marker=MARKERS[i % 6], label=name)
            ax.set_xticks(ladder)
            ax.set_ylim(bottom=0)
            ax.set(xlabel="r", title=f"images/s, batch {batch}")
            ax.grid(axis="y", color="#e5e5e5")
        panels[0].legend(frameon=False, fontsize=8)
        save(figure, file)


def by_r(row: Mapping[str, Any]) -> int:
    return int(row["r"])


def save(figure: Figure, file: Path) -> None:
    """Writes the same bytes for the same rows: otherwise an SVG would hold the time of day."""
    figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
