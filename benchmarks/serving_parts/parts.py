"""The parts of benchmarks.serving by name, in the order of measurement, and ratios of several parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.serving_parts.bench import Bench
from benchmarks.serving_parts.bounds import bare, decode, forward, free, peer
from benchmarks.serving_parts.goals import least
from benchmarks.serving_parts.large import large, two
from benchmarks.serving_parts.ours import kill, mixed, ready, spread, throughput
from benchmarks.serving_parts.peers import PEERS

PARTS: dict[str, Callable[[Bench], None]] = {
    "ready": ready,  # first, because later there would be kernels
    "throughput": throughput,
    "mixed": mixed,
    "spread": spread,
    "kill": kill,
    "forward": forward,
    "decode": decode,
    "free": free,
    "bare": bare,
    **{name: partial(peer, name) for name in PEERS},
    "large": large,
    "two": two,
}


def compare(bench: Bench) -> None:
    """The figures that are ratios of several parts."""
    speeds, figures = bench.speeds, bench.figures
    r = bench.args.ladder[-1]
    bounds = {"forward loop": speeds.get(f"forward loop r={r}"), "decoding": figures.get("decode_per_s")}
    bound = least(bounds | {"HTTP": speeds.get("HTTP")})
    ours = speeds.get(f"ours r={r}")
    if bench.is_cuda and bound and ours:
        bench.figure("of_bound", ours / bound[1], f"{bound[0]}, {bound[1]:,.0f}/s")
    pairs = [("over_litserve", ours, "litserve"), ("of_bare", speeds.get("free model"), "bare FastAPI route")]
    pairs += [(f"of_loop_{r}", speeds.get(f"ours r={r}"), f"forward loop r={r}") for r in (0, 13)]
    for key, figure, name in pairs:
        if figure and speeds.get(name):
            bench.figure(key, figure / speeds[name], f"{figure:,.0f} over {speeds[name]:,.0f} /s")
