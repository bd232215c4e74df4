"""All metrics of the service, and their text format. Labels come from closed sets.

The processes of a server share the memory of their values (`shared_values.py`), so that a scrape of one shows all.
"""

from __future__ import annotations

import bisect
from collections import Counter as Counts
from collections.abc import Hashable, Iterator, Sequence

from prometheus_client import REGISTRY as OWN_REGISTRY
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.samples import Sample

from server.dial import label_of
from server.shared_values import Collector, joined
from server.types import BatchKey

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

REQUESTS = Counter("tome_requests", "Requests to classify, answered", ["model", "r", "code"])
IMAGES = Counter("tome_images", "Images answered with a class", ["model", "r"])
REQUEST_S = Histogram("tome_request_duration_seconds", "From first byte to answer", ["model", "r"], buckets=_SECONDS)
DECODE_S = Histogram("tome_decode_duration_seconds", "Decoding and resizing an image", buckets=_SECONDS)
QUEUE_S = Histogram("tome_queue_duration_seconds", "Wait of an image for its batch", ["model", "r"], buckets=_SECONDS)
INFERENCE_S = Histogram("tome_inference_duration_seconds", "Time of a batch", ["model", "r"], buckets=_SECONDS)
BATCH_SIZE = Histogram(
    "tome_batch_size", "Images in a batch; all of them share model and r", ["model", "r"], buckets=_SIZES
)
DROPPED = Counter("tome_dropped_images", "Images given up in the queue: caller gone or deadline passed", ["reason"])
OUT_OF_MEMORY = Counter("tome_out_of_memory", "Batches that did not fit into the device's memory and were halved")
IN_FLIGHT = Gauge("tome_in_flight_images", "Images admitted and not yet answered", multiprocess_mode="livesum")
ENGINE_UP = Gauge(
    "tome_engine_up",
    "Whether an engine runs and every HTTP process reaches it; by its place in --device, from 0",
    ["engine"],
    multiprocess_mode="livemin",
)
MODELS_LOADED = Gauge(
    "tome_models_loaded", "Models that serve; of several engines the most", multiprocess_mode="livemax"
)
ENGINE_STARTS = Counter("tome_engine_starts", "Times an engine process was ready to serve")
CONFIG_VERSION = Gauge("tome_config_version", "Version of the live configuration", multiprocess_mode="livemax")
CONFIG_SOURCE_UP = Gauge(
    "tome_config_source_up", "Whether the shared configuration can be read", multiprocess_mode="livemin"
)
CONFIG_SOURCE_UP.set(1)  # for a process without a source, because the least value counts
CONFIG_REFUSED = Gauge(
    "tome_config_refused",
    "Whether the newest content of the shared configuration is refused",
    multiprocess_mode="livemax",
)
CONFIG_STALE = Gauge(
    "tome_config_stale",
    "Whether the last good configuration serves because its source is missing, unreadable or refused",
    multiprocess_mode="livemax",
)
DRIFT_CHECKED = Counter("tome_drift_checked", "Answered images computed again at r=0", ["model", "r"])
DRIFT_AGREED = Counter("tome_drift_agreed", "Those of them that keep the answer of r=0", ["model", "r"])
LIVE_AGREEMENT = Gauge(
    "tome_live_agreement",
    "Share of the last images checked that keep the answer of r=0; of several engines the lowest",
    ["model", "r"],
    multiprocess_mode="livemin",
)
DRIFT = Gauge(
    "tome_drift", "Whether live agreement has left the curve's interval", ["model", "r"], multiprocess_mode="livemax"
)


class BatchMetrics:
    """The batcher's observer: turns batches and drops into metrics."""

    def batch_ran(self, key: Hashable, waits_s: Sequence[float], run_s: float) -> None:
        if not isinstance(key, BatchKey) or key.operation != "forward":
            return
        labels = (key.model, label_of(key.schedule))
        BATCH_SIZE.labels(*labels).observe(len(waits_s))
        INFERENCE_S.labels(*labels).observe(run_s)
        _observe_all(QUEUE_S.labels(*labels), waits_s)

    def job_dropped(self, reason: str) -> None:
        DROPPED.labels(reason).inc()


def _observe_all(histogram: Histogram, values: Sequence[float]) -> None:
    """Observes each value. Adding up first takes a tenth of the time, because each observation writes to shared
    memory.
    """
    counts = Counts(bisect.bisect_left(histogram._upper_bounds, value) for value in values)
    histogram._sum.inc(sum(values))
    for place, count in counts.items():
        histogram._buckets[place].inc(count)


def exposition() -> bytes:
    """All metrics of all processes, in Prometheus' text format."""
    return generate_latest(_registry())


def samples() -> Iterator[Sample]:
    """All values of all processes, each with its name and labels."""
    for metric in _registry().collect():
        yield from metric.samples


def _registry() -> CollectorRegistry:
    if not joined():
        return OWN_REGISTRY
    registry = CollectorRegistry()
    registry.register(Collector(joined()))
    return registry
