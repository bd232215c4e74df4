"""A server far above its capacity: goodput, latency and memory over time.

python -m benchmarks.overload --data FOLDER --seconds 60

Measures the capacity of a fixed r with closed loops of 32 clients, then sends `--load` times as much in an open loop of
Poisson arrivals, each photo with a deadline. "goodput" is the number of images answered in time a second; its target is
90 % of the capacity. The table has a row for each tenth of the run, which would show a growing queue, creeping latency
or leaking memory. The last line is JSON: {"capacity", "goodput", "share", "statuses", "rows": [{"second",
"offered_per_s", "goodput_per_s", "p50_ms", "p99_ms", "resident_mb"}]}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.dial import MOST_CLIENTS, add_server, measure_capacity, patch, read_photos, serving
from server.bench.client import Connections, Target
from server.bench.load import Reply, Request, open_loop, poisson
from server.bench.rows import is_good

PARTS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_server(parser)
    parser.add_argument("--load", type=float, default=3.0, help="times the capacity")
    parser.add_argument("--r", type=int, default=0, help="the deployment's")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--deadline-ms", type=float, default=2000)
    parser.add_argument("--limit", type=int, default=200, help="use this many photos")
    args = parser.parse_args()
    args.max_r = args.r  # `serving` wants it for auto, which is not used here

    photos, _ = read_photos(args.data, args.limit)
    path = f"/classify?top_k=1&deadline_ms={args.deadline_ms:g}"
    with serving(args) as (address, name):
        patch(address, name, {"r": args.r})
        capacities = [asyncio.run(measure_capacity(address, path, photos, 10)) for _ in range(2)]
        capacity = capacities[1]  # the first warms up
        due = list(poisson(args.load * capacity, args.seconds, seed=0))
        with _watched(args.seconds) as resident_mb:
            replies = asyncio.run(send(Target(*address), path, photos, due))
        again = asyncio.run(measure_capacity(address, path, photos, 10))
    rows = judge(replies, resident_mb, args.seconds, args.deadline_ms / 1000)
    print(
        f"{name}, r={args.r}, {len(photos)} photos, deadline {args.deadline_ms:g} ms; {args.load:g} times the capacity"
    )
    print(f"capacity {capacity:.1f} images/s before, {again:.1f} after (closed loop, {MOST_CLIENTS} clients)")
    print(f"{'second':>6} {'offered/s':>9} {'goodput/s':>9} {'p50 ms':>7} {'p99 ms':>7} {'memory MB':>9}")
    for row in rows:
        print(
            f"{row['second']:>6.0f} {row['offered_per_s']:>9.1f} {row['goodput_per_s']:>9.1f} {row['p50_ms']:>7.0f} "
            f"{row['p99_ms']:>7.0f} {row['resident_mb']:>9.0f}"
        )
    goodput = sum(row["goodput_per_s"] for row in rows) / len(rows)
    statuses = Counter(reply.status for _, reply in replies)
    print(
        f"goodput {goodput:.1f} images/s, {100 * goodput / capacity:.0f} % of the capacity; statuses {dict(statuses)}"
    )
    print(
        json.dumps(
            {
                "model": name,
                "load": args.load,
                "capacity": capacity,
                "capacity_after": again,
                "goodput": goodput,
                "share": goodput / capacity,
                "statuses": dict(statuses),
                "rows": rows,
            }
        )
    )


async def send(target: Target, path: str, photos: Sequence[bytes], due: Sequence[float]) -> list[tuple[float, Reply]]:
    """Sends photos when they are due; returns each reply with the second in which it was due."""
    start = time.perf_counter()
    replies: list[tuple[float, Reply]] = []

    def note(reply: Reply) -> None:
        replies.append((time.perf_counter() - start - reply.seconds, reply))

    async with Connections(target) as client:
        await open_loop(client, [Request(path, photo) for photo in photos], due, watch=note)
    return replies


def judge(
    replies: Sequence[tuple[float, Reply]], resident_mb: Sequence[float], seconds: float, deadline_s: float
) -> list[dict[str, Any]]:
    """A row for each tenth of the run, by when requests were due."""
    rows = []
    for part in range(PARTS):
        start, end = part * seconds / PARTS, (part + 1) * seconds / PARTS
        ours = [reply for at, reply in replies if start <= at < end]
        answered = sorted(reply.seconds for reply in ours if reply.status == 200)
        memory = resident_mb[part * len(resident_mb) // PARTS :]
        rows.append(
            {
                "second": end,
                "offered_per_s": len(ours) / (end - start),
                "goodput_per_s": sum(is_good(reply, deadline_s) for reply in ours) / (end - start),
                "p50_ms": 1000 * answered[len(answered) // 2] if answered else 0.0,
                "p99_ms": 1000 * answered[int(0.99 * (len(answered) - 1))] if answered else 0.0,
                "resident_mb": memory[0] if memory else 0.0,
            }
        )
    return rows


@contextmanager
def _watched(seconds: float) -> Iterator[list[float]]:
    """Samples the resident memory of all the server's processes, a hundred times in the run."""
    noted: list[float] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(seconds / 100):
            noted.append(_resident_mb())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield noted
    finally:
        is_over.set()
        watching.join()


def _resident_mb() -> float:
    """Resident memory of our children and theirs, from /proc."""
    children: dict[int, list[int]] = {}
    resident: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue  # it has ended meanwhile
        children.setdefault(int(fields["PPid"]), []).append(int(status.parent.name))
        resident[int(status.parent.name)] = int(fields.get("VmRSS", "0").split()[0])
    found, todo = 0, list(children.get(os.getpid(), []))
    while todo:
        pid = todo.pop()
        found += resident.get(pid, 0)
        todo += children.get(pid, [])
    return found / 1024


if __name__ == "__main__":
    main()
