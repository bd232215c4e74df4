"""Copies a replica's metrics to Ray's, because a scrape behind Ray's proxy would reach one arbitrary replica.

Every sample becomes a gauge `ray_tome_*` of Ray, with Serve's own tags (application, deployment, replica). Buckets and
counts of a histogram are samples too, so `rate` and `histogram_quantile` work as usual.
"""

from __future__ import annotations

import asyncio

from prometheus_client import REGISTRY
from ray.serve.metrics import Gauge

EVERY_S = 5.0
"""Seconds between two copies. Ray itself reports every 10 s by default."""


async def export_forever() -> None:
    """Copies this process's metrics to Ray until it is cancelled."""
    gauges: dict[str, Gauge] = {}
    while True:
        await asyncio.to_thread(_export, gauges)
        await asyncio.sleep(EVERY_S)


def _export(gauges: dict[str, Gauge]) -> None:
    for family in REGISTRY.collect():
        for sample in family.samples:
            if not sample.name.startswith("tome_") or sample.name.endswith("_created"):
                continue
            if sample.name not in gauges:
                gauges[sample.name] = Gauge(sample.name, family.documentation, tuple(sample.labels))
            gauges[sample.name].set(sample.value, dict(sample.labels))
