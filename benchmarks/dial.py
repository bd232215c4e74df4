"""The value of the dial: r=0, r=max and auto under loads of 0.5 to 3 times the capacity of r=0.

python -m benchmarks.dial --model vit_tiny_patch16_224 --weights FILE --data FOLDER --backend torch --precision fp32

FOLDER is as for benchmarks.accuracy; its photos are sent as JPEG. It runs a real server, with one request a photo,
Poisson arrivals that do not wait for answers, and a deadline for each. "goodput" is the share of requests that were
answered in time, "top-1" the share of those answers that are right. Beside them are the simulator's results for the
same arrivals, by the speeds that the server knows; it leaves out HTTP and decoding. The last line is JSON: {"rows":
[{"policy", "load", "goodput", "top1", "mean_r", "p99_ms", "simulated": {"goodput", "mean_r", "p99_ms"}}]}.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import io
import json
import math
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from server.batching.policy import Rung
from server.bench.client import Connections, HttpAnswer, Target
from server.bench.load import Reply, Request, closed_loop, open_loop, poisson
from server.bench.rows import is_good, percentile
from server.calibration.simulator import simulate
from server.dial import AutoR

MOST_CLIENTS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_server(parser)
    parser.add_argument("--loads", default="0.5,0.8,1,1.5,2,3", help="times the capacity of r=0")
    parser.add_argument("--max-r", type=int, default=16, help="r=max, and the most that auto may take")
    parser.add_argument("--seconds", type=float, default=20, help="of each load")
    parser.add_argument("--deadline-ms", type=float, default=1000)
    parser.add_argument("--limit", type=int, help="use this many photos")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table into this file")
    args = parser.parse_args()

    photos, labels = read_photos(args.data, args.limit)
    policies = {"r=0": {"r": 0}, f"r={args.max_r}": {"r": args.max_r}, "auto": {"r": "auto", "max_r": args.max_r}}
    path = f"/classify?top_k=1&deadline_ms={args.deadline_ms:g}"
    rows: list[dict[str, Any]] = []
    with serving(args) as (address, name):
        capacity = 0.0
        for policy, setting in reversed(list(policies.items())):  # the last is r=0
            patch(address, name, setting)
            capacity = asyncio.run(measure_capacity(address, path, photos, args.seconds / 2))
            print(f"{policy}: {capacity:.1f} images/s from {MOST_CLIENTS} clients", file=sys.stderr)
        print(
            f"{name}, {len(photos)} photos, deadline {args.deadline_ms:g} ms; capacity at r=0 {capacity:.1f} images/s"
        )
        print(f"{'':>11} {'goodput %':>15} {'':>7} {'mean r':>13} {'p99 ms':>15}")
        simulated_or_not = f"{'real':>7} {'simul.':>7}"
        print(f"{'load':>4} {'policy':>6} {simulated_or_not} {'top-1 %':>7} {simulated_or_not[2:]} {simulated_or_not}")
        for load in map(float, args.loads.split(",")):
            due = list(poisson(load * capacity, args.seconds, seed=0))
            for policy, setting in policies.items():
                patch(address, name, setting)
                replies = asyncio.run(send(address, path, photos, due))
                row = judge(replies, labels, args.deadline_ms / 1000)
                row["simulated"] = simulated(address, name, due, args.deadline_ms / 1000, setting)
                rows.append({"policy": policy.replace(f"r={args.max_r}", "r=max"), "load": load} | row)
                print(line(rows[-1]), flush=True)
                time.sleep(args.deadline_ms / 1000)  # so that nothing of this load is left for the next
    if args.plot:
        from benchmarks.plot import draw_dial

        draw_dial(rows, args.plot)
    print(json.dumps({"model": name, "capacity": capacity, "rows": rows}))


def add_server(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `serving` and `read_photos`, except max_r."""
    parser.add_argument("--model", default="bundled", help="as for tome-server serve")
    parser.add_argument("--weights", help="safetensors file for a timm name")
    parser.add_argument("--data", type=Path, required=True, help="folder with labels.csv and images/")
    parser.add_argument("--backend", default="auto", help="as for tome-server serve")
    parser.add_argument("--precision", default="auto", help="as for tome-server serve")


def read_photos(folder: Path, limit: int | None) -> tuple[list[bytes], list[int]]:
    """The listed photos as JPEG files, and their class indices."""
    with (folder / "labels.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))[:limit]
    photos = []
    for row in listed:
        encoded = io.BytesIO()
        Image.open(folder / "images" / row["file"]).convert("RGB").save(encoded, "JPEG", quality=90)
        photos.append(encoded.getvalue())
    return photos, [int(row["label"]) for row in listed]


async def measure_capacity(address: tuple[str, int], path: str, photos: Sequence[bytes], seconds: float) -> float:
    """Images a second of clients that wait for their answers."""
    async with Connections(Target(*address)) as client:
        run = await closed_loop(client, [Request(path, photo) for photo in photos], MOST_CLIENTS, seconds)
    return sum(reply.status == 200 for reply in run.replies) / run.seconds


async def send(address: tuple[str, int], path: str, photos: Sequence[bytes], due: Sequence[float]) -> list[Reply]:
    """Sends requests when they are due; each reply has its JSON."""

    def read(answer: HttpAnswer) -> Any:
        return json.loads(answer.body)

    async with Connections(Target(*address)) as client:
        return (await open_loop(client, [Request(path, photo) for photo in photos], due, read=read)).replies


def judge(replies: Sequence[Reply], labels: Sequence[int], deadline_s: float) -> dict[str, Any]:
    """The results of the clients."""
    good = [reply for reply in replies if is_good(reply, deadline_s)]
    bodies = [(reply.said, labels[reply.number]) for reply in good]
    right = [body["results"][0]["top_k"][0]["index"] == label for body, label in bodies]
    p99_s = percentile(sorted(reply.seconds for reply in replies if reply.status == 200), 0.99)
    return {
        "goodput": len(good) / len(replies),
        "top1": sum(right) / len(right) if right else 0.0,
        "mean_r": statistics.mean(_mean_r(body["r"]) for body, _ in bodies) if bodies else 0.0,
        "p99_ms": 1000 * (p99_s or 0.0),
        "requests": len(replies),
        "statuses": {status: sum(r.status == status for r in replies) for status in {r.status for r in replies}},
    }


def simulated(
    address: tuple[str, int], name: str, due: Sequence[float], deadline_s: float, setting: dict[str, Any]
) -> dict[str, float] | None:
    """The simulator's results for the same arrivals; None without a curve with this `r`."""
    try:
        rows = _get(address, f"/v1/models/{name}/curve")["rows"]
    except urllib.error.HTTPError:
        return None
    steps = [Rung(tuple(r["schedule"]), r["batch_s"]["a"], r["batch_s"]["b"], r["agreement"]) for r in rows]
    fixed = next((step.schedule for step in steps if set(step.schedule) == {setting["r"]}), None)
    asked = AutoR(setting["max_r"]) if setting["r"] == "auto" else fixed
    if asked is None:
        return None
    outcome = simulate(steps, due, deadline_s, asked)
    return {"goodput": outcome.goodput, "mean_r": outcome.mean_r, "p99_ms": 1000 * outcome.p99_s}


def line(row: dict[str, Any]) -> str:
    """A row of the table, with simulated values beside the measured ones."""
    said = row["simulated"] or dict.fromkeys(("goodput", "mean_r", "p99_ms"), math.nan)
    return (
        f"{row['load']:>4} {row['policy']:>6} {100 * row['goodput']:>7.1f} {100 * said['goodput']:>7.1f} "
        f"{100 * row['top1']:>7.1f} {row['mean_r']:>5.1f} {said['mean_r']:>7.1f} "
        f"{row['p99_ms']:>7.0f} {said['p99_ms']:>7.0f}"
    )


def _mean_r(r: int | list[int]) -> float:
    return float(r) if isinstance(r, int) else statistics.mean(r)


@contextmanager
def serving(args: argparse.Namespace) -> Iterator[tuple[tuple[str, int], str]]:
    """Runs a server until it is ready; yields its address and the model's name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address: tuple[str, int] = free.getsockname()
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "server.cli", "serve", "--model", args.model, "--r", "auto"]
        command += ["--max-r", str(args.max_r), "--port", str(address[1]), "--state-dir", state]
        command += ["--log-level", "warning"]
        command += ["--backend", args.backend, "--precision", args.precision]
        command += ["--weights", args.weights] if args.weights else []
        server = subprocess.Popen(command)
        try:
            while not _is_ready(address):
                if server.poll() is not None:
                    raise SystemExit("the server did not start")
                time.sleep(0.2)
            yield address, _get(address, "/v1/models")["models"][0]["name"]
        finally:
            server.terminate()
            server.wait()


def patch(address: tuple[str, int], name: str, setting: dict[str, Any]) -> None:
    """Sets the deployment's `r`."""
    headers = {"content-type": "application/json"}
    url, body = f"http://{address[0]}:{address[1]}/v1/models/{name}", json.dumps(setting).encode()
    urllib.request.urlopen(urllib.request.Request(url, body, headers, method="PATCH")).close()


def _get(address: tuple[str, int], path: str) -> Any:
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}{path}") as response:
        return json.load(response)


def _is_ready(address: tuple[str, int]) -> bool:
    try:
        _get(address, "/readyz")
    except (urllib.error.URLError, OSError):
        return False
    return True


if __name__ == "__main__":
    main()
