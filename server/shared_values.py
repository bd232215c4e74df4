"""The values of metrics in memory that all processes of a server share: a scrape of one process shows all.

A `Sheet` is the memory of one supervised process and of its successors. Its totals (counters, histograms) continue over
a restart; its gauges are forgotten with the process. There is no folder that could be full or cleaned, and nothing
accumulates over restarts. A process that has joined (`join`) writes to its own sheet and reads all.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock
from typing import Any

from prometheus_client import values
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

from server.unnamed import UnnamedFile

_USED = struct.Struct("<Q")
_ENTRY = struct.Struct("<dI")
"""A value and the length of its name, which follows. All entries begin at multiples of eight bytes."""
_FIRST_BYTES = 1 << 16
_MERGED: dict[str, Callable[[list[float]], float]] = {"livemin": min, "livemax": max, "livesum": sum}
"""How to merge a gauge of several processes, by the names of prometheus_client."""


class Sheet:
    """The values of one process, readable by all. A process gets it as an argument."""

    def __init__(self) -> None:
        self.totals, self.gauges = UnnamedFile(), UnnamedFile()

    def forget_gauges(self) -> None:
        """Forgets the gauges of a process that has died; its counters stay."""
        self.gauges.clear()

    def values(self) -> Iterator[tuple[str, float]]:
        """All values by name."""
        for file in (self.totals, self.gauges):
            try:
                entries = list(_entries(file.read()))
            except ValueError:  # it has grown between the two calls of the read
                entries = list(_entries(file.read()))
            yield from ((name, value) for name, value, _ in entries)


_sheets: Sequence[Sheet] = ()


def join(sheets: Sequence[Sheet], index: int) -> None:
    """Keeps all metrics that this process makes from now on in its sheet.

    Args:
        sheets: The sheets of all processes.
        index: The place of this process's sheet.
    """
    global _sheets
    if "server.metrics" in sys.modules:
        raise RuntimeError("the metrics exist already, and would not be shared; import server.metrics after join()")
    _sheets = sheets
    values.ValueClass = _value_class(_Writer(sheets[index].totals), _Writer(sheets[index].gauges))


def joined() -> Sequence[Sheet]:
    """The sheets of all processes; empty if this process has not joined any."""
    return _sheets


class Collector:
    """All values of all processes as metrics, for a registry of prometheus_client.

    Args:
        sheets: The sheets of all processes.
    """

    def __init__(self, sheets: Sequence[Sheet]) -> None:
        self._sheets = sheets

    def collect(self) -> Iterable[Metric]:
        found: dict[str, list[float]] = {}
        for sheet in self._sheets:
            for name, value in sheet.values():
                found.setdefault(name, []).append(value)
        metrics: dict[str, Metric] = {}
        buckets: dict[str, dict[float, float]] = {}  # for each histogram and its labels
        for name, each in found.items():
            family, kind, mode, text, sample, labels = json.loads(name)
            metric = metrics.setdefault(family, Metric(family, text, kind))
            value = _MERGED.get(mode, sum)(each)
            if "le" in labels:
                bound = float(labels.pop("le"))
                buckets.setdefault(json.dumps([family, labels]), {})[bound] = value
            else:
                metric.add_sample(sample, labels, value)
        for key, counts in buckets.items():
            family, labels = json.loads(key)
            count = 0.0
            for bound in sorted(counts):
                count += counts[bound]
                metrics[family].add_sample(f"{family}_bucket", labels | {"le": _written(bound)}, count)
            metrics[family].add_sample(f"{family}_count", labels, count)
        return metrics.values()


def _written(bound: float) -> str:
    text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
    return text


class _Writer:
    """Named values in a file that grows with them. The values of a dead process continue."""

    def __init__(self, file: UnnamedFile) -> None:
        self._file = file
        try:
            self._places = {name: place for name, _, place in _entries(file.read())}
        except ValueError:  # the process died while it added a name
            file.clear()
            self._places = {}
        self._map(max(os.fstat(file.fileno()).st_size, _FIRST_BYTES))

    def _map(self, size: int) -> None:
        os.ftruncate(self._file.fileno(), size)
        self.memory = mmap.mmap(self._file.fileno(), size)

    def place(self, name: str) -> int:
        """Place of a named value (a double, 0 at first) in `memory`."""
        if name not in self._places:
            used = _USED.unpack_from(self.memory)[0] or _USED.size
            encoded = name.encode()
            entry = _ENTRY.pack(0.0, len(encoded)) + encoded
            entry += bytes(-len(entry) % 8)
            if used + len(entry) > len(self.memory):
                self._map(2 * len(self.memory))
            self.memory[used : used + len(entry)] = entry
            self.memory[: _USED.size] = _USED.pack(used + len(entry))
            self._places[name] = used
        return self._places[name]


def _entries(content: bytes) -> Iterator[tuple[str, float, int]]:
    """Name, value and place of each entry. Raises ValueError if the content is incomplete."""
    if len(content) < _USED.size:
        return  # a process that has not begun
    place, used = _USED.size, _USED.unpack_from(content)[0]
    if used > len(content):
        raise ValueError("it is incomplete")
    while place < used:
        value, length = _ENTRY.unpack_from(content, place)
        start = place + _ENTRY.size
        yield content[start : start + length].decode(), value, place
        place += -(-(_ENTRY.size + length) // 8) * 8


def _value_class(totals: _Writer, gauges: _Writer) -> type:
    """The value class that prometheus_client uses for each value of a metric."""
    lock, double = Lock(), struct.Struct("<d")

    class Value:
        _multiprocess = True

        def __init__(
            self,
            typ: str,
            metric_name: str,
            name: str,
            labelnames: Sequence[str],
            labelvalues: Sequence[str],
            help_text: str,
            multiprocess_mode: str = "",
            **others: Any,
        ) -> None:
            labels = dict(zip(labelnames, labelvalues, strict=True))
            self._writer = gauges if typ == "gauge" else totals
            with lock:
                self._place = self._writer.place(
                    json.dumps([metric_name, typ, multiprocess_mode, help_text, name, labels])
                )
                self._value: float = double.unpack_from(self._writer.memory, self._place)[0]

        def inc(self, amount: float) -> None:
            with lock:
                self._write(self._value + amount)

        def set(self, value: float, timestamp: float | None = None) -> None:
            with lock:
                self._write(value)

        def _write(self, value: float) -> None:
            self._value = value
            # in one piece, so that no reader sees half of it
            self._writer.memory[self._place : self._place + 8] = double.pack(value)

        def get(self) -> float:
            return self._value

        def set_exemplar(self, exemplar: Any) -> None:
            """Exemplars are not kept."""

        def get_exemplar(self) -> None:
            return None

    return Value
