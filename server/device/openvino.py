"""OpenVINO as the backend: the fastest on CPUs, and the only one here that must compile before it runs.

Graphs are compiled for each schedule. Torch in float32 stands in for a schedule that is not compiled. A thread compiles
what requests ask for, from the first request on, and then what the server planned: the ladder of the curve.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from server.cpus import cpu_name
from server.device.backend import BackendOptions
from server.device.later import Later
from server.device.models import LoadedModel
from server.device.openvino_compiler import TRACING, Compiler
from server.device.openvino_graphs import BATCH_SIZES, FEWER_BATCH_SIZES, AnyBatch, Run
from server.device.torch_backend import TorchBackend
from server.device.uses import Uses
from server.dial import Schedule, r_of, text_of
from server.types import BackendInfo, Compiling, ComputedBy
from tome_core.whole_file import write_whole

logger = logging.getLogger(__name__)

MOST_SCHEDULES = 16
"""Schedules kept in memory besides the warmed ones, however much of it there is."""

PLANNED_SHARE = 0.75
"""The part of these that the plan may take. The rest is for what requests name beside it."""

_FASTER = 1.05
"""How much faster bf16 must be for `auto` to take it."""

_TOLERANCES = {"fp32": 1e-3, "bf16": 0.5}
"""By how much a logit may differ from torch's in float32, as a part of the largest."""


class OpenVINOBackend:
    """Runs the merging model by OpenVINO, and by torch what OpenVINO has not compiled.

    The compiled graphs belong to the one thread that calls it. Another thread compiles, touches none of them, and hands
    over what it has made.

    Args:
        loaded: The model; its weights stay float32, which torch answers in.
        precision: "fp32", "bf16", or "auto", which measures both.
        options: Threads, cache, the largest batch, and memory.

    Attributes:
        info: What it is.
        merged: The model as torch computes it.
        most_schedules: Schedules kept in memory besides the warmed ones: as many as there is memory for, less the one
            that is compiled while the others are there.

    Raises:
        RuntimeError: OpenVINO cannot translate or compile the model, or gets it wrong.
    """

    def __init__(self, loaded: LoadedModel, precision: str, options: BackendOptions) -> None:
        self._torch = TorchBackend(loaded, torch.device("cpu"), "fp32")
        self.merged = self._torch.merged
        self._name, self._num_classes = loaded.info.name, len(loaded.info.labels)
        self._compiler = Compiler(
            loaded.merged.with_features(),
            loaded.info.preprocessing.input_size,
            options.threads,
            options.cache_dir,
            options.beside,
        )
        self._max_batch_size, self._in_background = options.max_batch_size, options.in_background
        self._unmerged = loaded.info.schedule(0)
        if self._in_background and self._compiler.threads > 1:
            self._compiler.translate_ahead(loaded.info.schedule(1))
        reason = "asked for"
        if precision == "auto":
            precision, reason = self._faster_precision()
        self.info = BackendInfo("openvino", precision, f"{reason}; {self._compiler.threads} threads")
        self._runs: dict[Schedule, AnyBatch] = {}
        self._ready = frozenset[Schedule]()  # the keys of `_runs`, for other threads
        self._warmed: set[Schedule] = set()
        self._planned: set[Schedule] = set()
        self._uses = Uses[Schedule]()
        schedule_bytes = (1 + max(map(len, FEWER_BATCH_SIZES.values()))) * self._compiler.graph_bytes
        self.most_schedules = max(0, min(MOST_SCHEDULES, options.memory_bytes // schedule_bytes - 1))
        # By weak references: as a circle a model that is unloaded would keep its memory until the collector comes, and
        # that is kept off what was there at the start.
        ours = weakref.proxy(self)
        self._later = Later[Schedule, AnyBatch](
            lambda schedule: ours._compile_aside(schedule), lambda schedule: ours._called(schedule), "openvino"
        )
        self.warm_up(self._unmerged)  # a model that OpenVINO gets wrong is refused here
        logger.info(
            "%s: OpenVINO keeps up to %d schedules that requests name, in %d MB of memory; torch answers others",
            *(self._name, self.most_schedules, self.most_schedules * schedule_bytes / 1e6),
        )

    def outputs(self, pixels: Tensor, schedule: Schedule) -> Tensor:
        """Pixels (B, H, W, 3) in uint8 to logits and pooled features, (B, K + C)."""
        self._take_over()
        uses = self._uses.note(schedule)
        if run := self._runs.get(schedule):
            return run(self.merged.normalised(pixels))
        if schedule in self._planned or self._has_room_for(uses):
            self._later.ask(schedule)
        return self._torch.outputs(pixels, schedule)

    def warm_up(self, schedule: Schedule, is_likely: bool = True) -> None:
        """Compiles the schedule, and keeps it for good: for all batches, or for one image until the plan ran."""
        self._warmed.add(schedule)
        self._compiler.keep(schedule)
        self._take_over()
        if schedule not in self._runs:
            self._put({schedule: self._compile(schedule, () if self._in_background else None)})

    def compile_later(self, schedules: Sequence[Schedule], compiled: Callable[[Schedule], None]) -> None:
        """Compiles these schedules on a thread, as many as there is memory for.

        What was warmed for one image is compiled for batches behind the first of them: whoever opens the page compares
        two schedules by one image. Requests have others compiled; `compiled` is called of those, too.
        """
        warmed = list(self._warmed) if self._in_background else []
        others = [schedule for schedule in schedules if schedule not in self._warmed]
        planned = others[: int(PLANNED_SHARE * self.most_schedules)]
        self._planned = set(planned)
        self._later.then(compiled)
        self._later.plan([*planned[:1], *warmed, *planned[1:]])

    def computed_by(self, schedule: Schedule) -> ComputedBy:
        """OpenVINO, or torch for a schedule that is not compiled."""
        stands_in = schedule not in self._ready
        info = self._torch.info if stands_in else self.info
        return ComputedBy(info.name, info.precision, stands_in)

    def compiling(self) -> Compiling | None:
        """The schedule that is compiled now, and how many are done and wait."""
        progress = self._later.progress()
        return progress and Compiling(progress.key, progress.done, progress.total)

    def is_quick(self, num_images: int, schedule: Schedule) -> bool:
        """Never: it returns when all is computed."""
        return False

    def warm_further(self) -> bool:
        """Nothing is left."""
        return False

    def close(self) -> None:
        """Compiles nothing more, and ends a translation."""
        self._later.close()
        self._compiler.close()

    def _take_over(self) -> None:
        """Takes what was compiled meanwhile; of what only requests named, the schedules used least make room."""
        if made := self._later.take():
            self._put(made)

    def _put(self, made: dict[Schedule, AnyBatch]) -> None:
        self._runs |= made
        while len(others := self._others()) > self.most_schedules - len(self._planned):
            del self._runs[self._uses.least(others)]
        self._ready = frozenset(self._runs)

    def _has_room_for(self, uses: int) -> bool:
        """Whether a schedule of so many uses is compiled: there is memory left, or one that is used less makes room."""
        others, coming = self._others(), len(self._later)
        if len(others) + coming < self.most_schedules - len(self._planned):
            return True
        return bool(others) and not coming and uses > self._uses.of(self._uses.least(others))

    def _others(self) -> list[Schedule]:
        """What is compiled because requests named it."""
        return [each for each in self._runs if each not in self._warmed and each not in self._planned]

    def _compile_aside(self, schedule: Schedule) -> AnyBatch:
        """Compiles what requests ask for, and what is planned; on the thread that compiles."""
        sizes = None if schedule in self._warmed else FEWER_BATCH_SIZES[self.info.precision]
        return self._compile(schedule, sizes, aside=True)

    def _compile(self, schedule: Schedule, sizes: Sequence[int] | None, aside: bool = False) -> AnyBatch:
        start, precision = time.perf_counter(), self.info.precision
        run = self._compiler.any_batch(schedule, self._max_batch_size, precision, sizes, aside)
        with TRACING:
            for size, graph in run.graphs:
                self._check(graph, schedule, size)
        took_s = time.perf_counter() - start
        logger.info("%s is compiled by OpenVINO in %s (%.1f s)", self._called(schedule), precision, took_s)
        return run

    def _called(self, schedule: Schedule) -> str:
        return f"{self._name} at r={text_of(r_of(schedule))}"

    @torch.inference_mode()
    def _check(self, run: Run, schedule: Schedule, size: int) -> None:
        """Raises RuntimeError where a graph does not compute what torch does, which has happened.

        Two pairs of tokens that are alike but for rounding may merge in either order: half of the images may differ.
        """
        shape, generator = (size, *self._compiler.input_size, 3), torch.Generator().manual_seed(0)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        compared = slice(self._num_classes or None)  # features have scales of their own; without classes they are all
        wanted = self._torch.outputs(pixels, schedule)[:, compared]
        difference = float((run(self.merged.normalised(pixels))[:, compared] - wanted).abs().amax(dim=1).quantile(0.5))
        allowed = _TOLERANCES[self.info.precision] * float(wanted.abs().max())
        if not difference <= allowed:
            raise RuntimeError(
                f"OpenVINO's outputs differ from torch's by {difference:.2g}; at most {allowed:.2g} may be"
            )

    def _faster_precision(self) -> tuple[str, str]:
        """Whether to take fp32 or bf16, and why: measured once for a model, a CPU and a number of threads."""
        if not self._compiler.has_bf16:
            return "fp32", "this CPU has no bf16"
        file, here = self._compiler.folder / "precision.json", [cpu_name(), self._compiler.threads]
        try:
            kept = json.loads(file.read_bytes())
            ratio = float(kept["ratio"]) if kept["on"] == here else None
        except (OSError, ValueError, KeyError, TypeError):
            ratio = None
        if ratio is None:
            ratio = self._measured_ratio()
            with contextlib.suppress(OSError):  # it is measured again at the next start
                write_whole(file, json.dumps({"on": here, "ratio": ratio}).encode())
        return ("bf16" if ratio > _FASTER else "fp32"), f"bf16 measured {ratio:.2f} times as fast as fp32"

    def _measured_ratio(self) -> float:
        """How many times as fast as fp32 bf16 is, unmerged: both are measured in turn."""
        threads = self._compiler.threads
        size = max(size for size in BATCH_SIZES["fp32"] if size <= self._max_batch_size)
        runs = {
            precision: self._compiler.graph(self._unmerged, size, precision, threads) for precision in ("fp32", "bf16")
        }
        images = torch.zeros(size * threads, 3, *self._compiler.input_size)
        seconds: dict[str, list[float]] = {precision: [] for precision in runs}
        for _ in range(6):
            for precision, run in runs.items():
                start = time.perf_counter()
                run(images)
                seconds[precision].append(time.perf_counter() - start)
        fp32, bf16 = (min(times) for times in seconds.values())  # the least disturbed
        return fp32 / bf16
