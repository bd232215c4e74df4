"""Our server under load: its start, throughput and latency, the spread of its work, and a fault."""

from __future__ import annotations

import os
import signal
from functools import partial
from itertools import product

from benchmarks.serving_parts.bench import Bench, PartError, Used, classify, note_of, percent_of
from benchmarks.serving_parts.goals import busiest
from benchmarks.serving_parts.processes import connections

SHARE = 0.6  # of the throughput, at which latency is measured


def ready(bench: Bench) -> None:
    """Time from the start of our server to its first 200 of /readyz at r=0: without kernels and state, and once
    more.
    """
    bench.forget()
    bench.figure("first_ready_s", bench.ours(r=0).ready_s)
    bench.end_server()
    bench.figure("ready_s", bench.ours(r=0).ready_s)


def throughput(bench: Bench) -> None:
    """Waiting clients at each r; at the last r also the engine's CPU time, and latency at a rate."""
    args, server = bench.args, bench.ours()
    for r in args.ladder[:-1]:
        bench.speeds[f"ours r={r}"] = bench.load(f"ours r={r}", server, bench.at(r), clients=args.concurrency).per_s
    r, engines = args.ladder[-1], server.processes("engine")
    main, whole, http = Used(engines, main_thread=True), Used(engines), Used(server.processes("http"))
    looks = [(at, used.look) for at, used in product(bench.window, (main, whole, http))]
    load = bench.load(f"ours r={r}", server, bench.at(r), clients=args.concurrency, during=looks)
    load.require_answers()
    bench.speeds[f"ours r={r}"] = load.per_s
    bench.figure("images_per_s", load.per_s, note_of(f"r={r}", load))
    http_us = 1e6 * sum(http.seconds.values()) / load.answered
    cpu = f"CPU: engine {percent_of(whole, load)}, HTTP {percent_of(http, load)} or {http_us:.0f} us an image"
    cpu += f", generators {load.generator_us:.0f} us"
    bench.figure("engine_us", 1e6 * sum(main.seconds.values()) / load.answered, cpu)
    rate = SHARE * load.per_s
    open_load = bench.load(f"ours r={r}, {SHARE:.0%} of that", server, bench.at(r), per_s=rate)
    open_load.require_answers()
    bench.figure("p99_ms", open_load.p99_ms or 0.0, note_of(f"at {rate:,.0f}/s", open_load))


def mixed(bench: Bench) -> None:
    """Requests for five r in turn, beside one r in their middle."""
    args, server, middle = bench.args, bench.ours(), max(bench.args.ladder[-1], 2)
    requests = [classify(photo, middle + step) for photo in bench.photos for step in range(-2, 3)]
    load = bench.load(f"ours r={middle - 2} to {middle + 2}", server, requests, clients=args.concurrency)
    alone = bench.speeds.get(f"ours r={middle}")
    if alone is None:
        alone = bench.load(f"ours r={middle}", server, bench.at(middle), clients=args.concurrency).per_s
    bench.figure("mixed", load.per_s / alone)


def spread(bench: Bench) -> None:
    """How evenly connections and work are spread over the HTTP processes."""
    args = bench.args
    server = bench.ours(http_workers=args.http_workers if args.http_workers > 1 else 4)
    processes, counts = server.processes("http"), dict[str, int]()
    used, (first, last) = Used(processes), bench.window

    def count() -> None:
        counts.update(connections(server.target.port, processes))

    bench.load(
        f"ours, {len(processes)} HTTP processes",
        server,
        bench.at(args.ladder[-1]),
        clients=args.spread_clients,
        during=[(first, used.look), ((first + last) / 2, count), (last, used.look)],
    )
    value, work = busiest(counts), busiest(used.seconds)
    if value is None:
        raise PartError("no connection was seen in /proc/net/tcp")
    clients = ", ".join(str(counts[name]) for name in sorted(counts))
    bench.figure("spread", value, f"clients {clients}; CPU time: {0.0 if work is None else work:.2f}")


def kill(bench: Bench) -> None:
    """`kill -9` of one of two engines under load."""
    args = bench.args
    server = bench.ours(device=args.two_devices)
    victim, (first, last) = server.processes("engine")["engine-0"], bench.window
    load = bench.load(
        "ours, one of two engines killed",
        server,
        bench.at(args.ladder[-1]),
        clients=args.concurrency,
        during=[(first + (last - first) / 4, partial(os.kill, victim, signal.SIGKILL))],
    )
    bench.end_server()  # not reused in this state
    bench.figure("lost", load.others, note_of(f"of {load.answered + load.others:,}", load))
