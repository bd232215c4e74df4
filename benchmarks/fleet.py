"""The machines that a load takes at each r, and a fleet that loses a zone: computed from a measured curve.

python -m benchmarks.fleet --curve CURVE.json --photos-per-s 100000 --price 0.10

CURVE.json is the curve of `tome-server calibrate` for a model on a machine; --price is the cost of an hour of that
machine, in any currency. The first table is arithmetic: machines at `--busy` of their capacity, and the cost of a
million photos. The second replays the load in virtual time by the server's own batcher and policy: three zones are
sized for r=0, and one is lost for half a minute, so that every other machine gets half as much again. Arrivals at a
machine are Poisson, as behind a balancer without knowledge of load; `--machines` of them are replayed and stand for
all. The last line is JSON: {"sizing": [...], "zone_lost": [{"policy", "phase", "goodput", "p99_ms", "mean_r",
"agreement"}]}.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from server.batching.ladder import steps_of
from server.calibration.simulator import Served, replay
from server.curve import Curve
from server.dial import AutoR, Schedule, r_of, text_of

PHASE_S = 30.0
PHASES = ("three zones", "two zones", "three again")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--curve", type=Path, required=True, help="measured on this kind of machine")
    parser.add_argument("--photos-per-s", type=float, default=100_000)
    parser.add_argument("--price", type=float, default=0.10, help="of a machine for an hour")
    parser.add_argument("--busy", type=float, default=0.8, help="share of its capacity that a machine is to use")
    parser.add_argument("--deadline-ms", type=float, default=1000)
    parser.add_argument("--machines", type=int, default=12, help="how many of the fleet are replayed")
    args = parser.parse_args()

    curve = Curve.model_validate_json(args.curve.read_text())
    print(f"{curve.model}, {curve.facts.backend} in {curve.facts.precision}, {curve.facts.threads} threads, ", end="")
    print(f"{curve.facts.device}; {args.photos_per_s:,.0f} photos/s, {args.busy:.0%} busy")
    sizing = list(size(curve, args.photos_per_s, args.busy, args.price))
    print(f"{'r':>4} {'images/s':>9} {'machines':>9} {'cost of 10^6':>13} {'agree %':>8} {'top-1 %':>8}")
    for row in sizing:
        top1 = "" if row["top1"] is None else f"{100 * row['top1']:.1f}"
        print(
            f"{row['r']:>4} {row['images_per_s']:>9.1f} {row['machines']:>9,} {row['cost_per_million']:>13.3f} "
            f"{100 * row['agreement']:>8.1f} {top1:>8}"
        )
    rate = args.busy * sizing[0]["images_per_s"]  # of each machine, while all zones are up
    print(f"\nsized for r=0, {sizing[0]['machines']:,} machines; a zone lost for {PHASE_S:g} s")
    print(f"{'policy':>7} {'':>12} {'in time %':>10} {'p99 ms':>8} {'mean r':>7} {'agree %':>8}")
    rows = []
    for policy, setting in (("r=0", curve.rows[0].r), ("auto", AutoR())):
        for phase, served in zip(PHASES, lose_a_zone(curve, rate, setting, args), strict=True):
            rows.append({"policy": policy, "phase": phase} | judge(served))
            row = rows[-1]
            print(
                f"{policy:>7} {phase:>12} {100 * row['goodput']:>10.2f} {row['p99_ms']:>8.0f} {row['mean_r']:>7.1f} "
                f"{100 * row['agreement']:>8.1f}",
                flush=True,
            )
    print(json.dumps({"model": curve.model, "sizing": sizing, "zone_lost": rows}))


def size(curve: Curve, per_s: float, busy: float, price: float) -> Iterator[dict[str, Any]]:
    """A row for each `r` that is worth its loss: machines, and the cost of a million photos."""
    known = {row.r: row for row in curve.rows}
    for step in steps_of(curve):
        row = known[step.schedule]
        assert row.images_per_s is not None, "a curve that was measured here knows its speeds"
        each = busy * row.images_per_s
        yield {
            "r": text_of(r_of(row.r)),
            "images_per_s": row.images_per_s,
            "machines": math.ceil(per_s / each),
            "cost_per_million": price / 3600 / each * 1e6,
            "agreement": row.agreement,
            "top1": row.top1,
        }


def lose_a_zone(
    curve: Curve, rate: float, setting: Schedule | AutoR, args: argparse.Namespace
) -> list[list[Served | None]]:
    """The results of the requests of each phase, over all replayed machines."""
    phases: list[list[Served | None]] = [[] for _ in PHASES]
    for machine in range(args.machines):
        arrivals = list(wave(rate, machine))
        served, _ = replay(
            steps_of(curve), arrivals, args.deadline_ms / 1000, setting, max_batch_size=curve.max_batch_size
        )
        for at, answer in zip(arrivals, served, strict=True):
            phases[int(at // PHASE_S)].append(answer)
    return phases


def wave(rate: float, seed: int) -> Iterator[float]:
    """Arrivals at one machine: the same load, on two thirds of the machines in the second phase."""
    numbers, now = random.Random(seed), 0.0
    while True:
        now += numbers.expovariate(1.5 * rate if PHASE_S <= now < 2 * PHASE_S else rate)
        if now >= PHASE_S * len(PHASES):
            return
        yield now


def judge(served: Sequence[Served | None]) -> dict[str, float]:
    """The results of the clients of a phase."""
    answers = [answer for answer in served if answer is not None]
    latencies = sorted(answer.latency_s for answer in answers)
    return {
        "goodput": len(answers) / len(served),
        "p99_ms": 1000 * latencies[int(0.99 * (len(latencies) - 1))],
        "mean_r": statistics.mean(statistics.mean(answer.schedule) for answer in answers),
        "agreement": statistics.mean(answer.agreement or 0.0 for answer in answers),
    }


if __name__ == "__main__":
    main()
