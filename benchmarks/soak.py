"""Whether a server stays stable under mixed traffic: memory, descriptors, threads, the disk, and its answers.

python -m benchmarks.soak --minutes 60
make soak                                 # ten minutes

It starts a server and sends it numbers, lists, auto, explain, changes, bad files, clients that leave, slow ones and
HEAD, at `--rate` requests a second. Every ten seconds it samples each process. The slopes count after
`--settle-minutes`, each with its 95 % interval. The run passes if no slope of memory or disk is significantly above the
goal, no process was restarted, the log has no traceback, and every answer is one that its request may get. Requests
with a deadline may get a 504, all may get a 429; any other 5xx is wrong.

The last line is JSON: {"passed", "is_sure", "reasons", "minutes", "answers", "wrong", "slopes": {NAME:
{"percent_an_hour", "low", "high"}}, "processes": {NAME: {"first", "last", "most"}}}. The exit status is 1 if it does
not pass.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving_parts.servers import running
from benchmarks.soak_parts.growth import LEAST_SAMPLES, Growth, growth_of
from benchmarks.soak_parts.traffic import RAW, Answers, Traffic, good_files
from benchmarks.soak_parts.watch import Watched, watching
from server.bench.client import Target
from server.bench.load import Request
from server.model_spec import BUNDLED_NAME

GOAL = 1.0
"""Largest growth of memory and disk, in percent an hour."""

EVERY_S = 10.0
MOST_AT_ONCE = 200
DISK = "disk"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--settle-minutes", type=float, help="do not count (default: 10, at most half of all)")
    parser.add_argument("--rate", type=float, default=10, help="requests a second, Poisson arrivals")
    parser.add_argument("--every", type=float, default=EVERY_S, help="seconds between two looks at the processes")
    parser.add_argument("--backend", default="auto", help="as for tome-server serve")
    parser.add_argument("--http-workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", default="", help="more flags of tome-server serve, in one string")
    args = parser.parse_args()
    settle_s = 60 * (min(10.0, args.minutes / 2) if args.settle_minutes is None else args.settle_minutes)

    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        for part in ("state", "tmp", "home"):
            (folder / part).mkdir()
        variables = {"TMPDIR": str(folder / "tmp"), "HOME": str(folder / "home")}
        command = [sys.executable, "-m", "server.cli", "serve", "--port", "{port}", "--backend", args.backend]
        command += ["--http-workers", str(args.http_workers), "--state-dir", str(folder / "state"), *args.serve.split()]
        first = Request("/classify", next(good_files()))
        with running(command, variables, first, RAW, "/readyz") as server:
            with watching(server.log, [folder / part for part in ("state", "tmp", "home")], args.every) as watched:
                answers = asyncio.run(send(server.target, 60 * args.minutes, args.rate, args.seed))
            log = server.log.read_text(errors="replace")
    slopes = slopes_of(watched, settle_s)
    verdict = judge(slopes, answers, watched.restarted, log)
    show(watched, slopes, answers, verdict)
    print(
        json.dumps(
            verdict
            | {
                "minutes": args.minutes,
                "answers": {f"{kind}: {status}": count for (kind, status), count in sorted(answers.counts.items())},
                "wrong": {f"{kind}: {status}": count for (kind, status), count in sorted(answers.wrong.items())},
                "slopes": {name: vars(growth) for name, growth in slopes.items()},
                "processes": {name: summary_of(watched, name) for name in watched.processes},
            }
        )
    )
    sys.exit(not verdict["passed"])


async def send(target: Target, seconds: float, rate: float, seed: int) -> Answers:
    """Sends traffic for a while, in an open loop, and waits for the last answers."""
    traffic, chance = Traffic(target, BUNDLED_NAME, seed), random.Random(seed)
    start = due = time.monotonic()
    running: set[asyncio.Task[None]] = set()
    try:
        while due < start + seconds:
            await asyncio.sleep(due - time.monotonic())
            if len(running) < MOST_AT_ONCE:
                running.add(task := asyncio.create_task(traffic.one()))
                task.add_done_callback(running.discard)
            due += chance.expovariate(rate)
        await asyncio.gather(*running)
    finally:
        await traffic.close()
    return traffic.answers


def slopes_of(watched: Watched, settle_s: float) -> dict[str, Growth]:
    """Growth of each process's memory, and of the disk. Only processes that ran all the time count."""
    first = sum(at < settle_s for at in watched.times_s)
    times_s = watched.times_s[first:]
    series: dict[str, Sequence[float]] = {DISK: watched.disk_mb[first:]}
    for name, samples in watched.processes.items():
        memory = [sample.memory_mb for sample in samples[first:] if sample is not None]
        if len(memory) == len(times_s):
            series[name] = memory
    if len(times_s) < LEAST_SAMPLES:
        return {}
    return {name: growth_of(times_s, values) for name, values in series.items()}


def judge(slopes: dict[str, Growth], answers: Answers, restarted: Sequence[str], log: str) -> dict[str, Any]:
    """The verdict: whether the run passes, why not, and whether it was long enough to be sure of the slopes."""
    reasons = [
        f"{name} grows by {growth.percent_an_hour:.1f} % an hour, at least {growth.low:.1f}"
        for name, growth in slopes.items()
        if growth.is_above(GOAL)
    ]
    reasons += [f"{kind}: {count} x {status}" for (kind, status), count in sorted(answers.wrong.items())]
    reasons += [f"{name} was restarted" for name in restarted]
    if "Traceback" in log:
        reasons.append(f"{log.count('Traceback')} tracebacks in the log")
    is_sure = bool(slopes) and all(growth.is_sure(GOAL) for growth in slopes.values())
    return {"passed": not reasons, "is_sure": is_sure, "reasons": reasons}


def summary_of(watched: Watched, name: str) -> dict[str, Any]:
    """The first, the last and the largest sample of a process."""
    samples = [sample for sample in watched.processes[name] if sample is not None]
    most = {key: max(vars(sample)[key] for sample in samples) for key in vars(samples[0])}
    return {"first": vars(samples[0]), "last": vars(samples[-1]), "most": most}


def show(watched: Watched, slopes: dict[str, Growth], answers: Answers, verdict: dict[str, Any]) -> None:
    """Prints the table."""
    kinds = sorted({kind for kind, _ in answers.counts})
    for kind in kinds:
        statuses = {status: count for (each, status), count in sorted(answers.counts.items()) if each == kind}
        print(f"{kind:>16}  {', '.join(f'{count} x {status}' for status, count in statuses.items())}")
    print(f"\n{'':>12} {'memory MB, first, last, most':>30} {'files':>12} {'threads':>12}  growth, % an hour")
    for name in sorted(watched.processes):
        whole = summary_of(watched, name)
        first, last, most = whole["first"], whole["last"], whole["most"]
        memory = f"{first['memory_mb']:.0f} {last['memory_mb']:>9.0f} {most['memory_mb']:>9.0f}"
        files = f"{first['descriptors']} {last['descriptors']:>5}"
        threads = f"{first['threads']} {last['threads']:>5}"
        print(f"{name:>12} {memory:>30} {files:>12} {threads:>12}  {told(slopes.get(name))}")
    disk = f"{watched.disk_mb[0]:.1f} {watched.disk_mb[-1]:>9.1f} {max(watched.disk_mb):>9.1f}"
    print(f"{DISK:>12} {disk:>30} {'':>12} {'':>12}  {told(slopes.get(DISK))}")
    print("\n" + ("passed" if verdict["passed"] else "NOT PASSED: " + "; ".join(verdict["reasons"])))
    if not verdict["is_sure"]:
        print("The run was too short to be sure of every slope.")


def told(growth: Growth | None) -> str:
    return f"{growth.percent_an_hour:+.1f} ({growth.low:+.1f} to {growth.high:+.1f})" if growth else "-"


if __name__ == "__main__":
    main()
