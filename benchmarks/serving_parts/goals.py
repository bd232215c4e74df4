"""The goals of serving, and a run's figures beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """One row of the table.

    Attributes:
        key: Key of its figure.
        title: Its description.
        before: The figure when the goal was set; None if unknown.
        goal: The goal.
        form: Format of its numbers.
        at_most: Whether the goal is an upper bound; otherwise it is a lower one.
        device: "cuda" or "cpu" if the goal is only for that.
    """

    key: str
    title: str
    before: float | None
    goal: float
    form: str = "{:,.0f}"
    at_most: bool = False
    device: str | None = None

    def is_met(self, figure: float) -> bool:
        """Whether a figure reaches the goal."""
        return figure <= self.goal if self.at_most else figure >= self.goal


GOALS = (
    Goal("images_per_s", "images/s", 4324, 10_000, device="cuda"),
    Goal("of_bound", "of the least of forward loop, decoding, HTTP", 0.45, 0.8, "{:.2f}", device="cuda"),
    Goal("p99_ms", "p99 at 60 % of that load, ms", None, 40, "{:.1f}", at_most=True, device="cuda"),
    Goal("over_litserve", "over LitServe, times", None, 5, "{:.1f}", device="cuda"),
    Goal("decode_per_s", "decode and resize on the device, images/s", 11_023, 20_000, device="cuda"),
    Goal("agreement", "same class by device and by Pillow, %", 97.8, 99, "{:.1f}", device="cuda"),
    Goal("large_0", "ViT-L/16@384, r=0: of the forward loop", 0.78, 0.92, "{:.2f}", device="cuda"),
    Goal("large_23", "ViT-L/16@384, r=23: of the forward loop", 0.78, 0.92, "{:.2f}", device="cuda"),
    Goal("two", "ViT-L/16@384, two GPUs over one", 1.79, 1.9, "{:.2f}", device="cuda"),
    Goal("engine_us", "engine's main thread, CPU us an image", 140, 25, at_most=True),
    Goal("http_per_s", "one HTTP process, a free model, requests/s", 1761, 4000, device="cuda"),
    Goal("spread", "connections, busiest HTTP process over mean", 3, 1.3, "{:.2f}", at_most=True),
    Goal("ready_s", "ready again, s", 10, 5, "{:.1f}", at_most=True, device="cuda"),
    Goal("first_ready_s", "ready the first time, s", 20, 12, "{:.1f}", at_most=True, device="cuda"),
    Goal("of_loop_0", "of the forward loop, r=0 (OpenVINO, 2 cores)", 0.84, 0.9, "{:.2f}", device="cpu"),
    Goal("of_loop_13", "of the forward loop, r=13 (OpenVINO, 2 cores)", 0.76, 0.87, "{:.2f}", device="cpu"),
    Goal("mixed", "five r mixed, of one", 0.94, 0.9, "{:.2f}", device="cpu"),
    Goal("of_bare", "one HTTP process, a free model, of a bare FastAPI route", 0.14, 0.5, "{:.2f}", device="cpu"),
    Goal("lost", "answers that are not 200 after kill -9 of one of two engines", 285, 0, at_most=True),
)


def rows_of(figures: Mapping[str, float], notes: Mapping[str, str], device: str) -> Iterator[dict[str, Any]]:
    """A row for each goal of this device, and for each figure of another.

    Args:
        figures: The measured figures, by the key of their goal.
        notes: More about a row, such as why it was not measured.
        device: "cuda" or "cpu".
    """
    for goal in GOALS:
        figure, is_for_us = figures.get(goal.key), goal.device in (None, device)
        if figure is None and not is_for_us:
            continue
        met = goal.is_met(figure) if figure is not None and is_for_us else None
        row = {"key": goal.key, "title": goal.title, "figure": figure, "met": met, "note": notes.get(goal.key, "")}
        yield row | {"before": goal.before if is_for_us else None, "goal": goal.goal if is_for_us else None}


def lines_of(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    """The lines of the table."""
    goals = {goal.key: goal for goal in GOALS}
    yield f"{'':<60} {'before':>8} {'goal':>9} {'figure':>9}"
    for row in rows:
        goal = goals[row["key"]]
        sign = "<= " if goal.at_most else ">= "
        before, figure = ("-" if row[key] is None else goal.form.format(row[key]) for key in ("before", "figure"))
        aim = "" if row["goal"] is None else sign + goal.form.format(row["goal"])
        verdict = {True: "met", False: "NOT MET", None: ""}[row["met"]]
        yield f"{goal.title:<60} {before:>8} {aim:>9} {figure:>9}  {verdict:<8}{row['note']}".rstrip()


def least(bounds: Mapping[str, float | None]) -> tuple[str, float] | None:
    """The smallest of several bounds, with its name; None if one is unknown."""
    known = {name: bound for name, bound in bounds.items() if bound is not None}
    if len(known) < len(bounds):
        return None
    return min(known.items(), key=lambda named: named[1])


def busiest(counts: Mapping[str, float]) -> float | None:
    """The largest of several counts over their mean; None if all are 0."""
    total = sum(counts.values())
    return max(counts.values()) * len(counts) / total if total else None
