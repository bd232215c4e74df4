"""OpenVINO as the backend: the fastest on CPUs, and the only one here that must compile before it runs.

Graphs are compiled for each schedule. A schedule that is not compiled is answered by torch, at once. Once it was asked
for three times a thread compiles it for the next time, where there is memory for it or it is used more than another.
"""

from __future__ import annotations

import logging
import time
import weakref

import torch
from torch import Tensor

from server.device.backend import BackendOptions
from server.device.later import Later
from server.device.models import LoadedModel
from server.device.openvino_compiler import TRACING, Compiler
from server.device.openvino_graphs import BATCH_SIZES, FEWER_BATCH_SIZES, AnyBatch, Run
from server.device.torch_backend import TorchBackend
from server.device.uses import Uses
from server.dial import Schedule, r_of, text_of
from server.types import BackendInfo, Compiling, ComputedBy

logger = logging.getLogger(__name__)

MOST_SCHEDULES = 16
"""Schedules kept in memory besides the warmed ones, however much of it there is."""

SEEN_OFTEN = 3
"""Batches after which a schedule that nobody warmed is compiled."""

_FASTER = 1.05
"""How much faster bf16 must be for `auto` to take it."""

_TOLERANCES = {"fp32": 1e-3, "bf16": 0.5}
"""By how much a logit may differ from torch's in float32, as a part of the largest."""


class OpenVINOBackend:
    """Runs the merging model by OpenVINO, and by torch what OpenVINO has not compiled.

    The compiled graphs are of the one thread that calls it. Another one compiles, touches none of them, and hands over
    what it has made.

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
        self._max_batch_size = options.max_batch_size
        self._unmerged = loaded.info.schedule(0)
        reason = "asked for"
        if precision == "auto":
            precision, reason = self._faster_precision()
        self.info = BackendInfo("openvino", precision, f"{reason}; {self._compiler.threads} threads")
        self._runs: dict[Schedule, AnyBatch] = {}
        self._warmed: set[Schedule] = set()
        self._ready = frozenset[Schedule]()  # the keys of `_runs`, for other threads
        self._uses = Uses[Schedule]()
        schedule_bytes = (1 + len(FEWER_BATCH_SIZES)) * self._compiler.graph_bytes
        self.most_schedules = max(0, min(MOST_SCHEDULES, options.memory_bytes // schedule_bytes - 1))
        # By weak references: as a circle a model that is unloaded would keep its memory until the collector comes, and
        # that is kept off what was there at the start.
        ours = weakref.proxy(self)
        self._later = Later[Schedule, AnyBatch](
            lambda schedule: ours._compile(schedule, aside=True), lambda schedule: ours._called(schedule), "openvino"
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
        if uses >= SEEN_OFTEN and self._has_room_for(uses):
            self._later.ask(schedule)
        return self._torch.outputs(pixels, schedule)

    def warm_up(self, schedule: Schedule, is_likely: bool = True) -> None:
        """Compiles the schedule for every batch size, and keeps it for good."""
        self._warmed.add(schedule)
        self._compiler.keep(schedule)
        self._take_over()
        if schedule not in self._runs:
            self._runs[schedule] = self._compile(schedule, aside=False)
            self._ready = frozenset(self._runs)

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

    def _take_over(self) -> None:
        """Takes what was compiled meanwhile; of those that nobody warmed the ones used least make room."""
        if made := self._later.take():
            self._runs |= made
            while len(unwarmed := self._unwarmed()) > self.most_schedules:
                del self._runs[self._uses.least(unwarmed)]
            self._ready = frozenset(self._runs)

    def _has_room_for(self, uses: int) -> bool:
        """Whether a schedule of so many uses is compiled: there is memory left, or one that is used less makes room."""
        unwarmed, coming = self._unwarmed(), len(self._later)
        if len(unwarmed) + coming < self.most_schedules:
            return True
        return bool(unwarmed) and not coming and uses > self._uses.of(self._uses.least(unwarmed))

    def _unwarmed(self) -> list[Schedule]:
        return [each for each in self._runs if each not in self._warmed]

    def _compile(self, schedule: Schedule, aside: bool) -> AnyBatch:
        start, precision = time.perf_counter(), self.info.precision
        run = self._compiler.any_batch(schedule, self._max_batch_size, precision, aside)
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
        """Measures fp32 and bf16 in turn, unmerged, and says which to take and why."""
        if not self._compiler.has_bf16:
            return "fp32", "this CPU has no bf16"
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
        reason = f"bf16 measured {fp32 / bf16:.2f} times as fast as fp32"
        return ("bf16" if fp32 > _FASTER * bf16 else "fp32"), reason
