"""The metrics of a replica among Ray's own, since behind Ray's proxy a scrape would meet one replica, whichever.

Every sample becomes a gauge of Ray's, `ray_tome_*`, with the tags that Serve puts on its own (application, deployment,
replica). Buckets and counts of a histogram are samples too: `rate` and `histogram_quantile` work on them as ever.
"""

from __future__ import annotations

import asyncio

from prometheus_client import REGISTRY
from ray.serve.metrics import Gauge

EVERY_S = 5.0
"""Between two copies; Ray itself reports every 10 s by default."""


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
