"""The bounds of our server, each alone, and other servers with the same model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.serving_parts.bench import Bench, PartError, Used
from benchmarks.serving_parts.generators import Load
from benchmarks.serving_parts.peers import FASTAPI, FREE, IMAGE, PEERS, small
from server.bench.load import Request

FREE_CLIENTS = 128


def forward(bench: Bench) -> None:
    """The forward loop without a server."""
    args = bench.args
    for r, per_s in forward_loop(bench, args.model, args.weights, args.max_batch_size, args.ladder).items():
        bench.speeds[f"forward loop r={r}"] = per_s


def decode(bench: Bench) -> None:
    """Decoding and resizing on the device, by benchmarks.decoding, and whether answers stay the same."""
    args, batch = bench.args, str(bench.args.max_batch_size)
    told = _decoding(bench, args.model, args.weights, batch, args.precision)
    for row in told["rows"]:
        if row["path"] == "device, decoded and resized":
            bench.figure("decode_per_s", row["images_per_s"], f"batch {row['batch']}, {row['cpu_ms']:.2f} ms of CPU")
    model, weights = args.agreement_model, args.agreement_weights
    if model is not None:
        told = _decoding(bench, model, weights, "32", "fp32")
    elif args.weights == "random":
        bench.notes["agreement"] = "weights are random; give --agreement-model, or run benchmarks.decoding"
        return
    bench.figure("agreement", 100 * told["agreement"], f"{model or args.model}, {told['photos']} photos")


def free(bench: Bench) -> None:
    """Our server around a model that costs nothing: one HTTP process, and on a GPU all of them too."""
    args = bench.args
    decoded = [Request("/classify?top_k=1", small(photo)) for photo in bench.photos[:20]]
    as_they_came = [Request("/classify?top_k=1", photo) for photo in bench.photos]
    load, us = _free(bench, 1, 0, decoded)
    key_note = f"small photos decoded, {us:.0f} us of CPU"
    bench.speeds["free model"] = load.per_s
    if bench.is_cuda:
        note = f"undecoded files; {key_note}: {load.per_s:,.0f}"
        load, us = _free(bench, 1, 1, as_they_came)
        key_note = f"{us:.0f} us of CPU, {note}"
    bench.figure("http_per_s", load.per_s, key_note)
    if bench.is_cuda and args.http_workers > 1:
        load, us = _free(bench, args.http_workers, 1, as_they_came)
        print(f"  {args.http_workers} HTTP processes: {us:.0f} us of CPU a request", flush=True)
    bench.speeds["HTTP"] = load.per_s


def bare(bench: Bench) -> None:
    """A bare FastAPI route: the upper bound of any server on FastAPI in one process."""
    requests = [Request("/classify?top_k=1", small(photo)) for photo in bench.photos[:20]]
    server = bench.server(FASTAPI, bench.peer_variables(), requests[0], IMAGE)
    load = bench.load("bare FastAPI route", server, requests, clients=FREE_CLIENTS)
    bench.speeds["bare FastAPI route"] = load.per_s


def peer(name: str, bench: Bench) -> None:
    """Another server with the same model."""
    other, args = PEERS[name], bench.args
    if not other.is_installed:
        raise PartError(f"not installed; pip install {other.install}")
    requests = other.requests(bench.photos)
    server = bench.server(other.command, bench.peer_variables(), requests[0], other.headers)
    load = bench.load(name, server, requests, headers=other.headers, clients=args.peer_clients)
    load.require_answers()
    bench.speeds[name] = load.per_s


def _free(bench: Bench, processes: int, decodes: int, requests: Sequence[Request]) -> tuple[Load, float]:
    """A load on the free model, and CPU us of HTTP processes a request."""
    variables = bench.peer_variables(HTTP=processes, DECODES=decodes)
    server = bench.server(FREE, variables, requests[0], IMAGE)
    used = Used(server.processes("http"))
    name = f"free model, {processes} HTTP, {'files' if decodes else 'decoded'}"
    looks = [(at, used.look) for at in bench.window]
    load = bench.load(name, server, requests, clients=FREE_CLIENTS * (2 if processes > 1 else 1), during=looks)
    load.require_answers()
    return load, 1e6 * sum(used.seconds.values()) / load.answered


def forward_loop(bench: Bench, model: str, weights: str | None, batch: int, ladder: Sequence[int]) -> dict[int, float]:
    """Images/s of a model at each r, by benchmarks.forward_loop."""
    args = bench.args
    flags = ["--model", model, "--batch", str(batch), "--r", *map(str, ladder), "--device", args.one_device]
    flags += ["--precision", args.precision, "--backend", args.backend, "--threads", str(args.threads)]
    flags += ["--duration", f"{min(args.duration, 3):g}", *(["--weights", weights] if weights else [])]
    told = {
        int(r): float(per_s) for r, per_s in bench.program("benchmarks.forward_loop", *flags)["images_per_s"].items()
    }
    for r, per_s in told.items():
        print(f"forward loop, {model}, r={r}: {per_s:,.1f} images/s", flush=True)
    return told


def _decoding(bench: Bench, model: str, weights: str | None, batch: str, precision: str) -> dict[str, Any]:
    args = bench.args
    flags = ["--images", str(args.images), "--limit", str(max(args.limit, 500)), "--model", model, "--batch", batch]
    flags += ["--device", args.one_device, "--precision", precision, "--threads", str(args.threads)]
    return bench.program("benchmarks.decoding", *flags, *(["--weights", weights] if weights else []))
