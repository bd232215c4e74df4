"""Our server beside others under one load, and beside what bounds it: the forward loop, decoding, a bare HTTP route.

python -m benchmarks.serving --photos FOLDER --model vit_tiny_patch16_224 --weights FILE --r 0,13

Each server runs alone, one after the other, with the same model, weights and preprocessing, in batches of up to 32, and
as many clients that wait for their answers. The others (benchmarks/peers) run timm's model in PyTorch; ours does too
unless --backend says otherwise. Whichever is not installed is left out by name. The last line is JSON: {"rows":
[{"name", "r", "images_per_s", "p50_ms", "p99_ms", "failed", "lagged"}], "ratios": [{"name", "ratio", "goal"}],
"left_out": {name: reason}}.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import importlib.util
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image

from server.bench.client import BrokenError, Client, Target
from server.bench.load import Request, Run, closed_loop
from server.bench.rows import Row, row_of
from server.device.backend import BackendOptions
from server.device.models import LoadedModel, load_model
from server.device.runner import Runner
from server.device.torch_backend import set_threads
from server.images.photos import choose_photos
from server.images.pillow import decode
from server.settings import ModelSpec
from server.types import Job

BATCH, ROUNDS = 32, 5
MAX_PIXELS = 89_000_000
SMALL = 32  # pixels: as much as the free model sees, so that decoding costs next to nothing
START_S = 300.0
PYTHON = sys.executable
IMAGE = {"content-type": "image/jpeg"}


@dataclass(frozen=True)
class Peer:
    """Another server.

    Attributes:
        module: What must be installed.
        install: What pip takes for it.
        command: Its program.
        path: Its endpoint.
        in_json: It takes images in base64 in JSON.
    """

    module: str
    install: str
    command: tuple[str, ...]
    path: str
    in_json: bool = False

    def requests(self, photos: Sequence[bytes]) -> list[Request]:
        if not self.in_json:
            return [Request(self.path, photo) for photo in photos]
        return [Request(self.path, json.dumps({"image": base64.b64encode(p).decode()}).encode()) for p in photos]


PEERS = {
    "litserve": Peer("litserve", "litserve", (PYTHON, "-m", "benchmarks.peers.litserve_app"), "/predict", True),
    "bentoml": Peer(
        "bentoml",
        "bentoml",
        (PYTHON, "-m", "bentoml", "serve", "benchmarks.peers.bentoml_app:Front", "--host", "127.0.0.1")
        + ("--port", "{port}"),
        "/classify",
    ),
    "ray": Peer("ray.serve", "'ray[serve]'", (PYTHON, "-m", "benchmarks.peers.ray_app"), "/"),
    "mosec": Peer(
        "mosec",
        "mosec",
        (PYTHON, "-m", "benchmarks.peers.mosec_app", "--port", "{port}", "--address", "127.0.0.1")
        + ("--timeout", "60000", "--log-level", "warning"),
        "/inference",
    ),
}
FASTAPI = (PYTHON, "-m", "benchmarks.peers.fastapi_app")
FREE = (PYTHON, "-m", "benchmarks.peers.free_app")


class NotStartedError(Exception):
    """A server ended before it answered, or did not answer in time; with the end of its log."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of photos")
    parser.add_argument("--limit", type=int, default=200, help="the most photos to use")
    parser.add_argument("--model", default="bundled", help="as for tome-server serve")
    parser.add_argument("--weights", help="safetensors file for a timm name")
    parser.add_argument("--r", default="0,13", help="values of r for ours")
    parser.add_argument("--concurrency", type=int, default=16, help="clients, each with one request at a time")
    parser.add_argument("--duration", type=float, default=10, help="seconds of each load")
    parser.add_argument("--warmup", type=float, default=3, help="seconds before; OpenVINO compiles ours then: 60")
    parser.add_argument("--peer", default=",".join(PEERS), help=f"some of {', '.join(PEERS)}, or none")
    parser.add_argument("--backend", default="torch", help="of ours, as for tome-server serve")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--http-workers", type=int, default=1, help="of ours, as for tome-server serve")
    args = parser.parse_args()
    peers = [] if args.peer == "none" else args.peer.split(",")
    if unknown := [name for name in peers if name not in PEERS]:
        parser.error(f"there is no peer {unknown[0]!r}; there are: {', '.join(PEERS)}")
    ladder = [int(r) for r in args.r.split(",")]
    middle = max(ladder[-1], 2)  # of five r that are mixed; merging costs about as much on either side
    ladder = list(dict.fromkeys([*ladder, middle]))

    photos = [file.read_bytes() for file in choose_photos(args.photos, args.limit, seed=0)]
    bench = Bench(args)
    print(f"{args.model}, {len(photos)} photos, {args.concurrency} clients, {args.duration:g} s each")
    print(f"{'':<22} {'r':>6} {'images/s':>9} {'p50 ms':>8} {'p99 ms':>8} {'failed':>6}")
    decoded = bench.decoding(photos)
    for r in ladder:
        bench.forward(decoded, r)
    small = [Request("/classify?top_k=1", _small(photos[0]))]
    bench.serve("bare FastAPI route", FASTAPI, {"": small})
    bench.serve("ours, a free model", FREE, {"": small})
    loads = {str(r): [Request(f"/classify?r={r}", photo) for photo in photos] for r in ladder}
    loads["mixed"] = [Request(f"/classify?r={middle + step}", photo) for photo in photos for step in range(-2, 3)]
    with tempfile.TemporaryDirectory() as state:
        bench.serve("ours", _ours(args, state), loads)
    for name in peers:
        if importlib.util.find_spec(PEERS[name].module.partition(".")[0]) is None:
            bench.leave_out(name, f"not installed; pip install {PEERS[name].install}")
        else:
            bench.serve(name, PEERS[name].command, {"": PEERS[name].requests(photos)}, PEERS[name].in_json)
    for name, reason in bench.left_out.items():
        print(f"left out: {name}: {reason}")
    ratios = ratios_of(bench.rows, ladder, middle)
    for each in ratios:
        print(f"{each['name']}: {each['ratio']:.2f} (goal: {each['goal']})")
    print(json.dumps({"model": args.model, "rows": bench.rows, "ratios": ratios, "left_out": bench.left_out}))


class Bench:
    """The rows of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.rows: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        spec = ModelSpec.model_validate({"source": args.model, "weights": args.weights})
        set_threads(args.threads)
        self._loaded: LoadedModel = load_model(spec)
        options = BackendOptions(args.backend, args.threads, None, BATCH)
        self._runner = Runner({spec.name: self._loaded}, args.device, args.precision, options)

    def decoding(self, photos: Sequence[bytes]) -> list[bytes]:
        """Decoding alone, in as many threads as an HTTP process has; gives the pixels."""
        preprocessing = self._loaded.info.preprocessing
        seconds: list[float] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in range(ROUNDS):
                start = time.perf_counter()
                pixels = list(pool.map(lambda photo: decode(photo, preprocessing, MAX_PIXELS), photos))
                seconds.append(time.perf_counter() - start)
        self._add("decoding alone", "", len(photos) / statistics.median(seconds))
        return pixels

    def forward(self, pixels: Sequence[bytes], r: int) -> None:
        """The device alone: full batches in a loop, as the engine runs them."""
        info = self._loaded.info
        seconds: list[float] = []
        schedule = info.schedule(r)
        key = info.batch_key(schedule)
        jobs = [Job(info.name, pixels[i % len(pixels)], schedule, 5, 0.0) for i in range(BATCH)]
        self._runner.warm_up(key)
        self._runner.run_batch(key, jobs)
        ends = time.perf_counter() + self._args.duration
        while len(seconds) < ROUNDS or time.perf_counter() < ends:
            start = time.perf_counter()
            self._runner.run_batch(key, jobs)
            seconds.append(time.perf_counter() - start)
        self._add("bare forward loop", str(r), BATCH / statistics.median(seconds))

    def serve(
        self, name: str, command: Sequence[str], loads: Mapping[str, Sequence[Request]], in_json: bool = False
    ) -> None:
        """A row for each load on a server that runs for them."""
        headers = {"content-type": "application/json"} if in_json else IMAGE
        try:
            with running(command, self._variables(), next(iter(loads.values()))[0], headers) as target:
                for r, requests in loads.items():
                    self._load(target, requests, headers, self._args.warmup)
                    row = self._load(target, requests, headers, self._args.duration)
                    self._add(
                        name, r, row.throughput, row.p50_ms, row.p99_ms, row.late + row.refused + row.failed, row.lagged
                    )
                    for status, said in row.problems.items():
                        print(f"  {status}, for example: {said}", file=sys.stderr)
        except NotStartedError as error:
            self.leave_out(name, str(error))

    def leave_out(self, name: str, reason: str) -> None:
        """Notes what is not measured, and why."""
        self.left_out[name] = reason

    def _load(self, target: Target, requests: Sequence[Request], headers: Mapping[str, str], seconds: float) -> Row:
        async def send() -> Run:
            async with Client(target, headers=headers) as client:
                return await closed_loop(client, requests, self._args.concurrency, seconds)

        return row_of(asyncio.run(send()), None, clients=self._args.concurrency)

    def _add(
        self,
        name: str,
        r: str,
        images_per_s: float,
        p50_ms: float | None = None,
        p99_ms: float | None = None,
        failed: int = 0,
        lagged: bool = False,
    ) -> None:
        row = {"name": name, "r": r, "images_per_s": images_per_s, "p50_ms": p50_ms, "p99_ms": p99_ms}
        self.rows.append(row | {"failed": failed, "lagged": lagged})
        times = " ".join(f"{'' if ms is None else f'{ms:.1f}':>8}" for ms in (p50_ms, p99_ms))
        late = "  the load generator was late itself" if lagged else ""
        print(f"{name:<22} {r:>6} {images_per_s:>9.1f} {times} {failed:>6}{late}", flush=True)

    def _variables(self) -> dict[str, str]:
        args = self._args
        said = {"MODEL": args.model, "WEIGHTS": args.weights, "DEVICE": args.device, "PRECISION": args.precision}
        said["THREADS"] = str(args.threads)
        return {f"PEER_{name}": value for name, value in said.items() if value is not None}


def ratios_of(rows: Sequence[Mapping[str, Any]], ladder: Sequence[int], middle: int) -> list[dict[str, Any]]:
    """What ours is worth beside its bounds; those of which both sides were measured."""
    speeds = {(row["name"], row["r"]): row["images_per_s"] for row in rows}
    pairs = [
        (f"end to end / bare forward loop, r={r}", ("ours", str(r)), ("bare forward loop", str(r)), 0.9) for r in ladder
    ]
    pairs += [(f"five r mixed / r={middle}", ("ours", "mixed"), ("ours", str(middle)), 0.9)]
    pairs += [("a free model / bare FastAPI route", ("ours, a free model", ""), ("bare FastAPI route", ""), 0.5)]
    return [
        {"name": name, "ratio": speeds[ours] / speeds[bound], "goal": goal}
        for name, ours, bound, goal in pairs
        if ours in speeds and speeds.get(bound)
    ]


@contextmanager
def running(
    command: Sequence[str], variables: Mapping[str, str], first: Request, headers: Mapping[str, str]
) -> Iterator[Target]:
    """A server on a free port, which has answered the first request; it ends with all that it has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = Target(*free.getsockname())
    environment = {**os.environ, **variables, "PEER_PORT": str(target.port)}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [part.replace("{port}", str(target.port)) for part in command],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            asyncio.run(_wait(server, target, first, headers, log))
            yield target
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(60)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # what it has left behind
            server.wait()


async def _wait(
    server: subprocess.Popen[bytes], target: Target, first: Request, headers: Mapping[str, str], log: IO[str]
) -> None:
    """Asks again and again until there is an answer."""
    ends, said = time.monotonic() + START_S, "nothing"
    async with Client(target, headers=headers) as client:
        while server.poll() is None and time.monotonic() < ends:
            try:
                answer = await client.post(first.path, first.body)
                if answer.status == 200:
                    return
                said = f"status {answer.status}"
            except BrokenError as error:
                said = str(error)
            await asyncio.sleep(0.2)
    log.seek(0)
    lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    raise NotStartedError(f"did not start ({said}): {' | '.join(lines[-3:])}")


def _ours(args: argparse.Namespace, state: str) -> list[str]:
    command = [PYTHON, "-m", "server.cli", "serve", "--port", "{port}", "--state-dir", state, "--log-level", "warning"]
    for name in ("model", "weights", "backend", "precision", "device", "threads", "http_workers"):
        if (value := getattr(args, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def _small(photo: bytes) -> bytes:
    encoded = io.BytesIO()
    Image.open(io.BytesIO(photo)).convert("RGB").resize((SMALL, SMALL)).save(encoded, "JPEG")
    return encoded.getvalue()


if __name__ == "__main__":
    main()
