"""One run of benchmarks.serving: its servers, its loads, and the figures so far."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.serving_parts.generators import During, Generators, Load, Order
from benchmarks.serving_parts.goals import GOALS
from benchmarks.serving_parts.peers import IMAGE, PYTHON
from benchmarks.serving_parts.processes import cpu_s
from benchmarks.serving_parts.servers import Server, running
from server.bench.load import Request

PROGRAM_S = 400.0
OURS = ("model", "weights", "device", "precision", "backend", "threads", "http_workers", "max_batch_size", "r")
_FORMS = {goal.key: goal for goal in GOALS}


class PartError(Exception):
    """A part cannot be measured; the message says why."""


class Bench:
    """Shared state of the parts.

    Args:
        args: The command line, with every default filled in.
        photos: Files to send.
        generators: Send them.
        folder: For logs, state and kernels.
    """

    def __init__(self, args: argparse.Namespace, photos: Sequence[bytes], generators: Generators, folder: Path) -> None:
        self.args, self.photos = args, photos
        self.is_cuda: bool = args.device.startswith("cuda")
        self.figures: dict[str, float] = {}
        self.notes: dict[str, str] = {}
        self.loads: list[dict[str, Any]] = []
        self.speeds: dict[str, float] = {}  # speeds that are not goals themselves, by name
        self._generators, self._folder = generators, folder
        self._stack = ExitStack()
        self._running: tuple[object, Server] | None = None

    @property
    def window(self) -> tuple[float, float]:
        """The measured seconds of a load, from its start."""
        return self.args.warmup, self.args.warmup + self.args.duration

    def at(self, r: int) -> list[Request]:
        """Requests for all photos at one r."""
        return [classify(photo, r) for photo in self.photos]

    def figure(self, key: str, value: float, note: str = "") -> None:
        """Records a figure and prints it."""
        self.figures[key] = value
        self.notes[key] = note
        goal = _FORMS[key]
        print(f"  {goal.title}: {goal.form.format(value)}{'; ' if note else ''}{note}", flush=True)

    def ours(self, **changes: Any) -> Server:
        """Our server by the command line, with some settings changed; it is warm at the last r."""
        said = {name: getattr(self.args, name) for name in OURS} | {"r": self.args.ladder[-1]} | changes
        state = self._folder / f"state-{said['model'].replace('/', '-')}-{said['device']}"
        command = [PYTHON, "-m", "server.cli", "serve", "--port", "{port}", "--log-level", "info"]
        command += ["--state-dir", str(state), "--max-queue-size", str(self.args.max_queue_size)]
        for name, value in said.items():
            if value is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        command += self.args.serve.split()
        return self.server(command, self._kernels(), Request("/classify", self.photos[0]), IMAGE, "/readyz")

    def server(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        first: Request,
        headers: Mapping[str, str],
        ready: str | None = None,
    ) -> Server:
        """Runs a server, after ending the previous one; the same server is kept while the arguments are equal."""
        words = (tuple(command), tuple(sorted(variables.items())))
        if self._running is None or self._running[0] != words:
            self.end_server()
            context = running(command, variables, first, headers, ready, self._folder)
            self._running = words, self._stack.enter_context(context)
        return self._running[1]

    def end_server(self) -> None:
        """Ends the running server, if there is one."""
        self._running = None
        self._stack.close()

    def forget(self) -> None:
        """Ends the server, and removes kernels and compiled models of earlier ones."""
        self.end_server()
        for folder in self._folder.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder)

    def load(
        self,
        name: str,
        server: Server,
        requests: Sequence[Request],
        *,
        headers: Mapping[str, str] = IMAGE,
        clients: int = 0,
        per_s: float = 0.0,
        warmup_s: float | None = None,
        seconds: float | None = None,
        during: During = (),
    ) -> Load:
        """A load from all generators: of waiting clients, or at a rate. It is printed and recorded."""
        warmup_s = self.args.warmup if warmup_s is None else warmup_s
        seconds = self.args.duration if seconds is None else seconds
        order = Order(server.target, requests, headers, clients, per_s, warmup_s, seconds)
        load = self._generators.run(order, during)
        said = {"name": name, "load": f"{clients} clients" if clients else f"{per_s:.0f}/s", "images_per_s": load.per_s}
        said |= {"p50_ms": load.p50_ms, "p99_ms": load.p99_ms, "failed": load.others, "lagged": load.lagged}
        self.loads.append(said | {"generator_us": load.generator_us, "statuses": load.statuses})
        times = " ".join(f"{'' if ms is None else f'{ms:.1f}':>8}" for ms in (load.p50_ms, load.p99_ms))
        late = f"  generators were late, by {load.lateness_ms:.1f} ms" if load.lagged else ""
        print(f"{name:<36} {said['load']:>12} {load.per_s:>9,.1f} {times} {load.others:>6}{late}", flush=True)
        for status, words in load.problems.items():
            print(f"  {status}, for example: {words[:200]}", flush=True)
        return load

    def program(self, module: str, *arguments: str) -> dict[str, Any]:
        """Runs a benchmark that needs the device alone, and returns the JSON of its last line.

        Raises:
            PartError: It failed.
        """
        self.end_server()
        command = [PYTHON, "-m", module, *arguments]
        try:
            ended = subprocess.run(
                command, env=self._kernels(inherit=True), capture_output=True, text=True, timeout=PROGRAM_S
            )
        except subprocess.TimeoutExpired:
            raise PartError(f"{module} has not ended after {PROGRAM_S:g} s") from None
        if ended.returncode:
            raise PartError(f"{module}: {' | '.join((ended.stderr or ended.stdout).strip().splitlines()[-3:])}")
        told: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
        return told

    def peer_variables(self, **more: object) -> dict[str, str]:
        """The variables of the programs in benchmarks/peers."""
        args = self.args
        said = {"MODEL": args.model, "WEIGHTS": args.weights, "DEVICE": args.device, "PRECISION": args.precision}
        said |= {"THREADS": args.threads, "BATCH": args.max_batch_size, **more}
        return {f"PEER_{name}": str(value) for name, value in said.items() if value is not None}

    def _kernels(self, inherit: bool = False) -> dict[str, str]:
        """Caches of compilers in this run's folder, so that its first server finds nothing."""
        names = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda"}
        places = {name: str(self._folder / f"kernels-{place}") for name, place in names.items()}
        return {**os.environ, **places} if inherit else places


class Used:
    """CPU time of processes between two times of a load.

    Args:
        processes: Their ids by name.
        main_thread: Whether to count only their main threads.
    """

    def __init__(self, processes: Mapping[str, int], main_thread: bool = False) -> None:
        self._processes, self._main_thread = processes, main_thread
        self._seen: list[dict[str, float]] = []

    def look(self) -> None:
        """Records one of the two times."""
        self._seen.append({name: cpu_s(pid, self._main_thread) for name, pid in self._processes.items()})

    @property
    def seconds(self) -> dict[str, float]:
        """CPU time between the first and the last look, by name."""
        first, last = self._seen[0], self._seen[-1]
        return {name: last[name] - first[name] for name in first}


def classify(photo: bytes, r: int) -> Request:
    """A request to our server for one photo at one r."""
    return Request(f"/classify?r={r}", photo)


def note_of(words: str, load: Load) -> str:
    """The note of a figure from a load."""
    others = {status: count for status, count in load.statuses.items() if status != 200}
    return words + (f", others: {others}" if others else "") + ("; generators were late" if load.lagged else "")


def percent_of(used: Used, load: Load) -> str:
    """CPU of each process in a load, in percent of a core."""
    return "/".join(f"{100 * seconds / load.seconds:.0f}" for seconds in used.seconds.values()) + " %"
