"""OpenVINO as the backend: the fastest on CPUs, and the only one here that must compile before it runs.

A graph is compiled for each schedule and each of a few batch sizes. Larger batches run in parts, which on a CPU costs
nothing: past 8 images a larger batch is no faster. A schedule that is not compiled yet is answered by torch, at once,
while a thread compiles it for the next time.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openvino
import timm
import torch
from torch import Tensor

import tome_core
from server.dial import Schedule, r_of, text_of
from server.engine.torch_backend import TorchBackend
from server.models import LoadedModel
from server.types import BackendInfo
from tome_core.openvino import save, to_openvino

if TYPE_CHECKING:
    from server.engine.backend import BackendOptions

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8)
"""What graphs are compiled for."""

MOST_SCHEDULES = 16
"""Schedules kept compiled besides the warmed ones; the one that was used longest ago makes room."""

_FASTER = 1.05
"""How much faster bf16 must be for `auto` to take it."""

_TOLERANCES = {"fp32": 1e-3, "bf16": 0.5}
"""By how much a logit may differ from torch's in float32, as a part of the largest."""

Run = Callable[[Tensor], Tensor]


class OpenVINOBackend:
    """Runs the merging model by OpenVINO, and by torch what OpenVINO has not compiled.

    Args:
        loaded: The model; its weights stay float32, which torch answers in.
        precision: "fp32", "bf16", or "auto", which measures both.
        options: Threads, cache and the largest batch.

    Attributes:
        info: What it is.
        dtype: What it wants its images in: float32, whatever it computes in.

    Raises:
        RuntimeError: OpenVINO cannot translate or compile the model, or gets it wrong.
    """

    dtype = torch.float32

    def __init__(self, loaded: LoadedModel, precision: str, options: BackendOptions) -> None:
        self._torch = TorchBackend(loaded.merged, torch.device("cpu"), "fp32")
        self._name = loaded.info.name
        self._compiler = Compiler(
            loaded.merged, loaded.info.preprocessing.input_size, options.threads, options.cache_dir
        )
        self._batch_sizes = [size for size in BATCH_SIZES if size <= options.max_batch_size]
        self._unmerged = loaded.info.schedule(0)
        reason = "asked for"
        if precision == "auto":
            precision, reason = self._faster_precision()
        self.info = BackendInfo("openvino", precision, f"{reason}; {self._compiler.threads} threads")
        self._runs: dict[Schedule, Mapping[int, Run]] = {}
        self._warmed: set[Schedule] = set()
        self._failed: set[Schedule] = set()
        self._compiling: Schedule | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="openvino")
        self.warm_up(self._unmerged)  # a model that OpenVINO gets wrong is refused here

    def logits(self, images: Tensor, schedule: Schedule) -> Tensor:
        """Normalised images (B, 3, H, W) to logits (B, K)."""
        runs = self._runs.get(schedule)
        if runs is None:
            self._compile_later(schedule)
            return self._torch.logits(images, schedule)
        if schedule not in self._warmed:
            self._runs[schedule] = self._runs.pop(schedule)  # the latest is the last
        parts, start = [], 0
        for size in parts_of(len(images), self._batch_sizes):
            part = images[start : start + size]
            start += len(part)
            if len(part) < size:
                part = torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])
            parts.append(runs[size](part))
        return torch.cat(parts)[: len(images)]

    def warm_up(self, schedule: Schedule) -> None:
        """Compiles the schedule for every batch size, and keeps it for good."""
        self._warmed.add(schedule)
        if schedule not in self._runs:
            self._runs[schedule] = self._compile(schedule)

    def forward(self, schedule: Schedule, batch_size: int) -> Run:
        """The graph for one schedule and batch size, compiled now: images (batch_size, 3, H, W) to logits."""
        return self._compiler.compile(schedule, batch_size, self.info.precision)

    def _compile(self, schedule: Schedule) -> Mapping[int, Run]:
        start = time.perf_counter()
        runs = {size: self.forward(schedule, size) for size in self._batch_sizes}
        for size, run in runs.items():
            self._check(run, schedule, size)
        r, took_s = text_of(r_of(schedule)), time.perf_counter() - start
        logger.info("%s at r=%s is compiled by OpenVINO in %s (%.1f s)", self._name, r, self.info.precision, took_s)
        return runs

    @torch.inference_mode()
    def _check(self, run: Run, schedule: Schedule, size: int) -> None:
        """Raises RuntimeError where a graph does not compute what torch does, which has happened.

        Two pairs of tokens that are alike but for rounding may merge in either order: half of the images may differ.
        """
        images = torch.randn(size, 3, *self._compiler.input_size, generator=torch.Generator().manual_seed(0))
        wanted = self._torch.logits(images, schedule)
        difference = float((run(images) - wanted).abs().amax(dim=1).quantile(0.5))
        allowed = _TOLERANCES[self.info.precision] * float(wanted.abs().max())
        if not difference <= allowed:
            raise RuntimeError(
                f"OpenVINO's logits differ from torch's by {difference:.2g}; at most {allowed:.2g} may be"
            )

    def _compile_later(self, schedule: Schedule) -> None:
        """Hands the schedule to the compiling thread, unless that is busy: it will be asked for again."""
        if self._compiling is None and schedule not in self._failed:
            self._compiling = schedule
            self._thread.submit(self._compile_now, schedule)

    def _compile_now(self, schedule: Schedule) -> None:
        try:
            runs = self._compile(schedule)
            unwarmed = [each for each in self._runs if each not in self._warmed]
            if len(unwarmed) >= MOST_SCHEDULES:
                self._runs.pop(unwarmed[0], None)
            self._runs[schedule] = runs
        except Exception:  # the thread has nobody to raise to; torch goes on answering
            logger.exception("OpenVINO cannot compile %s at r=%s", self._name, text_of(r_of(schedule)))
            self._failed.add(schedule)
        finally:
            self._compiling = None

    def _faster_precision(self) -> tuple[str, str]:
        """Measures fp32 and bf16 in turn, unmerged, and says which to take and why."""
        size = self._batch_sizes[-1]
        if not self._compiler.has_bf16:
            return "fp32", "this CPU has no bf16"
        runs = {precision: self._compiler.compile(self._unmerged, size, precision) for precision in ("fp32", "bf16")}
        images = torch.zeros(size, 3, *self._compiler.input_size)
        seconds: dict[str, list[float]] = {precision: [] for precision in runs}
        for _ in range(6):
            for precision, run in runs.items():
                start = time.perf_counter()
                run(images)
                seconds[precision].append(time.perf_counter() - start)
        fp32, bf16 = (min(times) for times in seconds.values())  # the least disturbed
        reason = f"bf16 measured {fp32 / bf16:.2f} times as fast as fp32"
        return ("bf16" if fp32 > _FASTER * bf16 else "fp32"), reason


class Compiler:
    """Turns a model into callables, one for a schedule, a batch size and a precision.

    Args:
        merged: The merging model, in eval mode and float32.
        input_size: Height and width of its images.
        threads: CPU threads; 0 takes what the container may use.
        cache_dir: Where translated and compiled graphs are kept for the next start; None keeps them for this process.

    Attributes:
        input_size: As given.
        threads: How many it uses.
    """

    def __init__(
        self,
        merged: tome_core.MergedViT,
        input_size: tuple[int, int],
        threads: int = 0,
        cache_dir: Path | None = None,
    ) -> None:
        self.input_size = input_size
        self.threads = threads or available_cpus()
        self._merged = merged
        self._core = openvino.Core()
        if cache_dir is None:
            cache_dir = Path(tempfile.mkdtemp(prefix="tome-server-openvino-"))
            weakref.finalize(self, shutil.rmtree, cache_dir, ignore_errors=True)
        self._folder = cache_dir / _fingerprint(merged, input_size)
        self._folder.mkdir(parents=True, exist_ok=True)

    @property
    def has_bf16(self) -> bool:
        """Whether the CPU computes in bf16 itself."""
        return "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def compile(self, schedule: Schedule, batch_size: int, precision: str) -> Run:
        """Compiles, or takes from the cache.

        Args:
            schedule: `r` of each block.
            batch_size: Images that the callable takes.
            precision: "fp32" or "bf16".

        Returns:
            Images (batch_size, 3, H, W), float32, to logits (batch_size, K).
        """
        model = self._core.read_model(self._translated(schedule))
        model.reshape([batch_size, 3, *self.input_size])
        config = config_of(precision, self.threads) | {
            "CACHE_DIR": str(self._folder / "compiled"),
            "CACHE_MODE": "OPTIMIZE_SIZE",  # weights come from the translation
        }
        request = self._core.compile_model(model, "CPU", config).create_infer_request()

        def run(images: Tensor) -> Tensor:
            answer = request.infer({0: images.contiguous().numpy()}, share_inputs=True)
            return torch.from_numpy(answer[0])

        return run

    @torch.no_grad()
    def _translated(self, schedule: Schedule) -> Path:
        """The schedule's graph as a file: the one that is there, or a new one."""
        file = self._folder / f"r{text_of(r_of(schedule)).replace(',', '-')}.xml"
        if not file.exists():
            model = to_openvino(self._merged, schedule, self.input_size)
            with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                written = Path(folder) / file.name
                save(model, written)
                written.with_suffix(".bin").replace(file.with_suffix(".bin"))
                written.replace(file)  # last: where it is, all is
        return file


def config_of(precision: str, threads: int) -> dict[str, Any]:
    """How OpenVINO is to compute: "fp32" or "bf16", one batch at a time on so many threads."""
    return {
        "INFERENCE_PRECISION_HINT": {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16}[precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": "1",
    }


def parts_of(num_images: int, batch_sizes: list[int]) -> list[int]:
    """Cuts a batch into parts of sizes that are compiled; the last may have room for one image more."""
    parts = []
    while num_images > 0:
        fitting = [size for size in batch_sizes if size <= num_images]
        size = max(fitting)
        if num_images > 2 and num_images + 1 in batch_sizes:
            size = num_images + 1
        parts.append(size)
        num_images -= size
    return parts


def available_cpus() -> int:
    """CPUs that this process may use: those it may run on, and no more than its cgroup's share of time."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no cgroup, or one of the first version
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, math.ceil(int(quota) / int(period))))


def _fingerprint(merged: tome_core.MergedViT, input_size: tuple[int, int]) -> str:
    """A name for all that a graph depends on but the schedule: weights, layers, versions, and our own code."""
    digest = hashlib.sha256()
    for name, tensor in merged.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    digest.update(repr((merged.model, input_size)).encode())
    digest.update(repr((openvino.__version__, torch.__version__, timm.__version__)).encode())
    for file in sorted(Path(tome_core.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:24]
