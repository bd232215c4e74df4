"""Our server under load, beside its goals, other servers, and its bounds: forward loop, decoding, HTTP.

python -m benchmarks.serving --device cuda --images FOLDER --model vit_base_patch16_224 --weights random
python -m benchmarks.serving --device cpu --images FOLDER --model vit_tiny_patch16_224 --weights FILE --backend openvino

It has parts (--part); the default are those that make sense on the device. One server runs at a time, and several load
generators, each a process, send to it. Servers are started by their command lines and observed through HTTP and /proc.
A part that fails, or is not installed, is reported by name, and the other parts go on. SIGTERM ends the loads and
reports the results so far. The last line is JSON: {"rows": [{"key", "title", "before", "goal", "figure", "met",
"note"}], "loads": [{"name", "load", "images_per_s", "p50_ms", "p99_ms", "failed", "lagged", "generator_us"}], "speeds":
{name: per second}, "left_out": {part: reason}}.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import FrameType

from benchmarks.serving_parts.bench import Bench
from benchmarks.serving_parts.generators import Generators
from benchmarks.serving_parts.goals import lines_of, rows_of
from benchmarks.serving_parts.parts import PARTS, compare
from server.images.photos import choose_photos

DEFAULT_PARTS = {
    "cuda": "ready,throughput,spread,kill,forward,decode,free,litserve,large,two",
    "cpu": "ready,throughput,mixed,spread,kill,forward,free,bare,litserve,bentoml,ray,mosec",
}
DEFAULTS = {  # by device: precision, r, HTTP processes, batch, clients, clients of peers, seconds
    "cuda": ("bf16", [13], 8, 128, 640, 256, 6.0),
    "cpu": ("fp32", [0, 13], 1, 32, 64, 64, 10.0),
}


def main() -> None:
    args = read_arguments()
    photos = [file.read_bytes() for file in choose_photos(args.images, args.limit, seed=0)]
    mean_kb = sum(map(len, photos)) / len(photos) / 1e3
    print(f"{args.model} on {args.device}, {len(photos)} photos of {mean_kb:.0f} kB, {args.generators} generators")
    print(f"{'':<36} {'load':>12} {'images/s':>9} {'p50 ms':>8} {'p99 ms':>8} {'failed':>6}", flush=True)
    signal.signal(signal.SIGTERM, _interrupt)
    left_out: dict[str, str] = {}
    with Generators(args.generators) as generators, tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, photos, generators, Path(folder))
        try:
            left_out = run(bench, args.parts, args.most_s)
        finally:
            bench.end_server()
        compare(bench)
    rows = list(rows_of(bench.figures, bench.notes, "cuda" if bench.is_cuda else "cpu"))
    print()
    for line in lines_of(iter(rows)):
        print(line)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    facts = {"model": args.model, "device": args.device, "r": args.ladder[-1], "generators": args.generators}
    told = {"rows": rows, "loads": bench.loads, "speeds": bench.speeds, "left_out": left_out}
    print(json.dumps(facts | told), flush=True)


def run(bench: Bench, names: list[str], most_s: float) -> dict[str, str]:
    """Measures parts in their order; returns those that were left out, each with the reason."""
    left_out: dict[str, str] = {}
    start = time.monotonic()
    for name, part in PARTS.items():
        if name not in names:
            continue
        if "interrupted" in left_out.values() or time.monotonic() - start > most_s:
            left_out[name] = f"no time: {time.monotonic() - start:.0f} s had passed"
            continue
        began = time.monotonic()
        try:
            part(bench)
        except KeyboardInterrupt:
            left_out[name] = "interrupted"
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {error}"
        said = f": {left_out[name]}" if name in left_out else ""
        print(f"-- {name} took {time.monotonic() - began:.0f} s{said}", flush=True)
    return left_out


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the defaults of its device filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of photos")
    parser.add_argument("--limit", type=int, default=200, help="the most photos to use")
    parser.add_argument("--part", help=f"some of {', '.join(PARTS)}, with commas (default: by device)")
    parser.add_argument("--most-s", type=float, default=480, help="no part begins after so many seconds")
    parser.add_argument("--duration", type=float, help="seconds of each load that count (default: 6 on cuda, else 10)")
    parser.add_argument("--warmup", type=float, default=2, help="seconds before; OpenVINO compiles then: 60")
    parser.add_argument("--generators", type=int, default=min(5, _cpus() // 2) or 1, help="processes that send")
    parser.add_argument("--concurrency", type=int, help="clients, each with one request at a time")
    parser.add_argument("--peer-clients", type=int, help="the same, of other servers")
    parser.add_argument("--spread-clients", type=int, default=320, help="the same, of part spread")
    served = parser.add_argument_group("ours, as for tome-server serve; the peers get the same model")
    served.add_argument("--model", default="bundled")
    served.add_argument("--weights", help="safetensors file for a timm name, or random")
    served.add_argument(
        "--r",
        type=int,
        nargs="+",
        metavar="R",
        help="values of r; the goals are of the last (default: 13 on cuda, else 0 13)",
    )
    served.add_argument("--device", default="auto")
    served.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: bf16 on cuda, else fp32")
    served.add_argument("--backend", default="torch")
    served.add_argument("--threads", type=int, default=0)
    served.add_argument("--http-workers", type=int, help="default: 8 on cuda, else 1")
    served.add_argument("--max-batch-size", type=int, help="of the peers, too (default: 128 on cuda, else 32)")
    served.add_argument("--max-queue-size", type=int, help="default: twice the clients, at least 256")
    served.add_argument("--serve", default="", help="more flags of tome-server serve, in one string")
    others = parser.add_argument_group("other models")
    others.add_argument("--agreement-model", help="with real weights: for part decode, where --weights is random")
    others.add_argument("--agreement-weights")
    others.add_argument("--large-model", default="vit_large_patch16_384")
    others.add_argument("--large-weights", default="random")
    others.add_argument("--large-batch", type=int, default=64)
    others.add_argument("--large-clients", type=int, default=256, help="on one GPU; on two, twice as many")
    args = parser.parse_args(words)
    if args.device == "auto":
        args.device = "cuda" if gpus() else "cpu"
    kind = "cuda" if args.device.startswith("cuda") else "cpu"
    names = ("precision", "r", "http_workers", "max_batch_size", "concurrency", "peer_clients", "duration")
    for name, value in zip(names, DEFAULTS[kind], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.ladder = args.r
    args.r = args.ladder[-1]  # the deployment's, which our server records before it is ready
    if args.max_queue_size is None:
        clients = max(args.concurrency, args.spread_clients, 2 * args.large_clients)
        args.max_queue_size = max(256, 2 * clients)
    args.one_device = args.device.split(",")[0]
    args.two_devices = "cpu,cpu" if kind == "cpu" else "cuda:0,cuda:1" if gpus() > 1 else "cuda:0,cuda:0"
    args.parts = (args.part or DEFAULT_PARTS[kind]).split(",")
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    return args


def gpus() -> int:
    """The number of GPUs, without torch, which would hold memory of one."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len(visible.split(",")) if visible else 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
