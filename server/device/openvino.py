"""OpenVINO as the backend: the fastest on CPUs, and the only one here that must compile before it runs.

Graphs are compiled for each schedule. Until a schedule is compiled, torch in float32 computes it. A thread compiles
first the schedules that requests name, and then those that the server planned: the ladder of the curve.
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
"""Most schedules in memory besides the warmed ones, even if there is more memory."""

PLANNED_SHARE = 0.75
"""The part of these that planned schedules may take. The rest is for others that requests name."""

_FASTER = 1.05
"""How much faster bf16 must be for `auto` to take it."""

_TOLERANCES = {"fp32": 1e-3, "bf16": 0.5}
"""Largest difference of a logit from torch's in float32, as a part of the largest logit."""


class OpenVINOBackend:
    """Runs the merging model by OpenVINO, and schedules that are not compiled by torch.

    The compiled graphs belong to the one thread that calls it. Another thread compiles. It uses none of these graphs,
    and hands over those that it has made.

    Args:
        loaded: The model. Its weights stay float32, because torch computes in float32.
        precision: "fp32", "bf16", or "auto", which measures both.
        options: Threads, cache, the largest batch, and memory.

    Attributes:
        info: Name, precision and reason.
        merged: The model as torch computes it.
        most_schedules: Most schedules in memory besides the warmed ones. The memory of one is left for the next
            compilation.

    Raises:
        RuntimeError: OpenVINO cannot translate or compile the model, or computes it wrongly.
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
        # By a weak reference. In a reference cycle, an unloaded model would keep its memory until a garbage collection,
        # which ignores objects of the start.
        ours = weakref.proxy(self)
        self._later = Later[Schedule, AnyBatch](
            lambda schedule: ours._compile_aside(schedule), lambda schedule: ours._called(schedule), "openvino"
        )
        try:
            self.warm_up(self._unmerged)  # refuses a model that OpenVINO computes wrongly
        except BaseException:
            self.close()  # a translation may have begun, which nobody needs now
            raise
        logger.info(
            "%s: OpenVINO keeps up to %d schedules besides those of the start, in %d MB; torch computes others",
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
        """Compiles the schedule, and never drops it; only for one image if `compile_later` follows."""
        self._warmed.add(schedule)
        self._compiler.keep(schedule)
        self._take_over()
        if schedule not in self._runs:
            self._put({schedule: self._compile(schedule, () if self._in_background else None)})

    def compile_later(self, schedules: Sequence[Schedule], compiled: Callable[[Schedule], None]) -> None:
        """Compiles these schedules on a thread, as many as fit into memory.

        The first of them is compiled first, because the page compares two schedules by one image. Then schedules that
        were warmed for one image are compiled for batches. `compiled` is also called for schedules that requests name.

        """
        warmed = list(self._warmed) if self._in_background else []
        others = [schedule for schedule in schedules if schedule not in self._warmed]
        planned = others[: int(PLANNED_SHARE * self.most_schedules)]
        self._planned = set(planned)
        self._later.then(compiled)
        self._later.plan([*planned[:1], *warmed, *planned[1:]])

    def computed_by(self, schedule: Schedule) -> ComputedBy:
        """OpenVINO, or torch if the schedule is not compiled."""
        is_fallback = schedule not in self._ready
        info = self._torch.info if is_fallback else self.info
        return ComputedBy(info.name, info.precision, is_fallback)

    def compiling(self) -> Compiling | None:
        """The schedule that is compiled now, and how many are done and in total."""
        progress = self._later.progress()
        return progress and Compiling(progress.key, progress.done, progress.total)

    def is_quick(self, num_images: int, schedule: Schedule) -> bool:
        """Whether the launch of a batch takes no time: never."""
        return False

    def warm_further(self) -> bool:
        """False: no work is left."""
        return False

    def close(self) -> None:
        """Starts no other compilation, and kills a running translation."""
        self._later.close()
        self._compiler.close()

    def _take_over(self) -> None:
        """Takes newly compiled schedules. If memory is short, drops the least used that only requests named."""
        if made := self._later.take():
            self._put(made)

    def _put(self, made: dict[Schedule, AnyBatch]) -> None:
        self._runs |= made
        while len(others := self._others()) > self.most_schedules - len(self._planned):
            del self._runs[self._uses.least(others)]
        self._ready = frozenset(self._runs)

    def _has_room_for(self, uses: int) -> bool:
        """Whether to compile a schedule of so many uses: there is memory, or a less used one can be dropped."""
        others, coming = self._others(), len(self._later)
        if len(others) + coming < self.most_schedules - len(self._planned):
            return True
        return bool(others) and not coming and uses > self._uses.of(self._uses.least(others))

    def _others(self) -> list[Schedule]:
        """The schedules that were compiled only because requests named them."""
        return [each for each in self._runs if each not in self._warmed and each not in self._planned]

    def _compile_aside(self, schedule: Schedule) -> AnyBatch:
        """Compiles a requested or planned schedule, on the thread that compiles."""
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
        """Raises RuntimeError if a graph does not compute what torch computes, which has happened.

        Two pairs of tokens of nearly equal similarity may merge in either order. So half of the images may differ.
        """
        shape, generator = (size, *self._compiler.input_size, 3), torch.Generator().manual_seed(0)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        compared = slice(
            self._num_classes or None
        )  # logits only, because features have other scales; without classes, the features
        wanted = self._torch.outputs(pixels, schedule)[:, compared]
        difference = float((run(self.merged.normalised(pixels))[:, compared] - wanted).abs().amax(dim=1).quantile(0.5))
        allowed = _TOLERANCES[self.info.precision] * float(wanted.abs().max())
        if not difference <= allowed:
            raise RuntimeError(f"OpenVINO's outputs differ from torch's by {difference:.2g}; the most is {allowed:.2g}")

    def _faster_precision(self) -> tuple[str, str]:
        """The faster of fp32 and bf16, and why: measured once for a model, a CPU and a number of threads."""
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
        """The speed of bf16 divided by that of fp32, at r=0. Both are measured in turns."""
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
