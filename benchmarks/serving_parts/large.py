"""A large model, whose time is mostly the forward pass, on one GPU and on two."""

from __future__ import annotations

from benchmarks.serving_parts.bench import Bench, PartError
from benchmarks.serving_parts.bounds import forward_loop

LARGE_R = (0, 23)
LARGE_WARMUP_S = 4.0  # our server records one r before it is ready, and the other in this time


def large(bench: Bench) -> None:
    """A large model, whose time is mostly the forward pass."""
    args = bench.args
    bounds = forward_loop(bench, args.large_model, args.large_weights, args.large_batch, LARGE_R)
    for r in LARGE_R:
        per_s = _large(bench, args.one_device, r)
        bench.figure(f"large_{r}", per_s / bounds[r], f"{per_s:,.0f} of {bounds[r]:,.0f} images/s")


def two(bench: Bench) -> None:
    """The large model on two GPUs, beside one."""
    devices, r = bench.args.two_devices, LARGE_R[-1]
    if len(set(devices.split(","))) < 2:
        raise PartError(f"needs two GPUs; there is {devices.split(',')[0]}")
    one = bench.speeds.get(f"large r={r}") or _large(bench, bench.args.one_device, r)
    both = _large(bench, devices, r)
    bench.figure("two", both / one, f"{both:,.0f} over {one:,.0f} images/s at r={r}")


def _large(bench: Bench, devices: str, r: int) -> float:
    """The large model through our server, on one device or two; images/s."""
    args = bench.args
    settings = {"model": args.large_model, "weights": args.large_weights, "max_batch_size": args.large_batch}
    server = bench.ours(device=devices, r=LARGE_R[-1], **settings)
    engines = len(devices.split(","))
    name = f"{args.large_model} r={r}{', two' if engines > 1 else ''}"
    warmup_s = max(args.warmup, LARGE_WARMUP_S)
    load = bench.load(name, server, bench.at(r), clients=args.large_clients * engines, warmup_s=warmup_s)
    load.require_answers()
    if engines == 1:
        bench.speeds[f"large r={r}"] = load.per_s
    return load.per_s
