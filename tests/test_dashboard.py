"""The dashboard asks for metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prometheus_client import REGISTRY

import server.metrics  # noqa: F401 (registers ours)

DASHBOARD = Path(__file__).parents[1] / "docker/grafana/dashboards/tome-server.json"


def test_every_metric_of_the_dashboard_is_one_of_ours() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {
        name for panel in panels for target in panel["targets"] for name in re.findall(r"\btome_\w+", target["expr"])
    }
    ours = {
        name
        for family in REGISTRY.collect()
        for name in (
            {f"{family.name}_total"}
            if family.type == "counter"
            else {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
            if family.type == "histogram"
            else {family.name}
        )
    }
    assert asked <= ours
    assert len(asked) >= 10


def test_panels_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in panels}) == len(panels)
