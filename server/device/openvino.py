"""OpenVINO as the backend: the fastest on CPUs, and the only one here that must compile before it runs.

Graphs are compiled for each schedule. A schedule that is not compiled yet is answered by torch, at once, while a thread
compiles it for the next time.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import pickle
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openvino
import timm
import torch
from torch import Tensor

import tome_core
from server.cpus import available_cpus
from server.device.models import LoadedModel
from server.device.openvino_graphs import BATCH_SIZES, AnyBatch, Run, any_batch, config_of, run_of
from server.device.torch_backend import TorchBackend
from server.dial import Schedule, r_of, text_of
from server.lifetime import end_with_parent
from server.types import BackendInfo
from tome_core.openvino import save, to_openvino
from tome_core.openvino_operator import build_operator, to_bfloat16

if TYPE_CHECKING:
    from server.device.backend import BackendOptions

logger = logging.getLogger(__name__)

MOST_SCHEDULES = 16
"""Schedules kept compiled besides the warmed ones; the one that was used longest ago makes room."""

_FASTER = 1.05
"""How much faster bf16 must be for `auto` to take it."""

_TOLERANCES = {"fp32": 1e-3, "bf16": 0.5}
"""By how much a logit may differ from torch's in float32, as a part of the largest."""


class OpenVINOBackend:
    """Runs the merging model by OpenVINO, and by torch what OpenVINO has not compiled.

    Args:
        loaded: The model; its weights stay float32, which torch answers in.
        precision: "fp32", "bf16", or "auto", which measures both.
        options: Threads, cache and the largest batch.

    Attributes:
        info: What it is.
        merged: The model as torch computes it.

    Raises:
        RuntimeError: OpenVINO cannot translate or compile the model, or gets it wrong.
    """

    def __init__(self, loaded: LoadedModel, precision: str, options: BackendOptions) -> None:
        self._torch = TorchBackend(loaded, torch.device("cpu"), "fp32")
        self.merged = self._torch.merged
        self._name = loaded.info.name
        self._compiler = Compiler(
            loaded.merged, loaded.info.preprocessing.input_size, options.threads, options.cache_dir
        )
        self._max_batch_size = options.max_batch_size
        self._unmerged = loaded.info.schedule(0)
        reason = "asked for"
        if precision == "auto":
            precision, reason = self._faster_precision()
        self.info = BackendInfo("openvino", precision, f"{reason}; {self._compiler.threads} threads")
        self._runs: dict[Schedule, AnyBatch] = {}
        self._warmed: set[Schedule] = set()
        self._failed: set[Schedule] = set()
        self._compiling: Schedule | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="openvino")
        self.warm_up(self._unmerged)  # a model that OpenVINO gets wrong is refused here

    def logits(self, pixels: Tensor, schedule: Schedule) -> Tensor:
        """Pixels (B, H, W, 3) in uint8 to logits (B, K)."""
        run = self._runs.get(schedule)
        if run is None:
            self._compile_later(schedule)
            return self._torch.logits(pixels, schedule)
        if schedule not in self._warmed:
            self._runs[schedule] = self._runs.pop(schedule)  # the latest is the last
        return run(self.merged.normalised(pixels))

    def warm_up(self, schedule: Schedule) -> None:
        """Compiles the schedule for every batch size, and keeps it for good."""
        self._warmed.add(schedule)
        if schedule not in self._runs:
            self._runs[schedule] = self._compile(schedule)

    def _compile(self, schedule: Schedule) -> AnyBatch:
        start, precision = time.perf_counter(), self.info.precision
        run = self._compiler.any_batch(schedule, self._max_batch_size, precision)
        for size, graph in run.graphs:
            self._check(graph, schedule, size)
        r, took_s = text_of(r_of(schedule)), time.perf_counter() - start
        logger.info("%s at r=%s is compiled by OpenVINO in %s (%.1f s)", self._name, r, precision, took_s)
        return run

    @torch.inference_mode()
    def _check(self, run: Run, schedule: Schedule, size: int) -> None:
        """Raises RuntimeError where a graph does not compute what torch does, which has happened.

        Two pairs of tokens that are alike but for rounding may merge in either order: half of the images may differ.
        """
        shape, generator = (size, *self._compiler.input_size, 3), torch.Generator().manual_seed(0)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        wanted = self._torch.logits(pixels, schedule)
        difference = float((run(self.merged.normalised(pixels)) - wanted).abs().amax(dim=1).quantile(0.5))
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
            self._compiler.translate_aside(schedule)
            run = self._compile(schedule)
            unwarmed = [each for each in self._runs if each not in self._warmed]
            if len(unwarmed) >= MOST_SCHEDULES:
                self._runs.pop(unwarmed[0], None)
            self._runs[schedule] = run
        except Exception:  # the thread has nobody to raise to; torch goes on answering
            logger.exception("OpenVINO cannot compile %s at r=%s", self._name, text_of(r_of(schedule)))
            self._failed.add(schedule)
        finally:
            self._compiling = None

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
        self._operator = self._built(cache_dir)
        self._folder = cache_dir / _fingerprint(merged, input_size, self._operator)
        self._folder.mkdir(parents=True, exist_ok=True)

    @property
    def has_bf16(self) -> bool:
        """Whether the CPU computes in bf16 itself."""
        return "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def any_batch(self, schedule: Schedule, max_batch_size: int, precision: str) -> AnyBatch:
        """Compiles a schedule for any number of images up to `max_batch_size`, or takes it from the cache."""

        def graph(size: int, side_by_side: int) -> Run:
            return self.graph(schedule, size, precision, side_by_side)

        return any_batch(graph, self.threads, max_batch_size, precision)

    def graph(self, schedule: Schedule, batch_size: int, precision: str, side_by_side: int = 1) -> Run:
        """Compiles one graph, or takes it from the cache.

        Args:
            schedule: `r` of each block.
            batch_size: Images that it takes.
            precision: "fp32" or "bf16".
            side_by_side: How many of it run at a time, with a share of the threads each.

        Returns:
            A function of any multiple of `batch_size` images.
        """
        config = config_of(precision, self.threads, side_by_side) | {
            "CACHE_DIR": str(self._folder / "compiled"),
            "CACHE_MODE": "OPTIMIZE_SIZE",  # weights come from the translation
        }
        return run_of(self.compiled(schedule, batch_size, precision, config), batch_size, side_by_side)

    def compiled(
        self, schedule: Schedule, batch_size: int, precision: str, config: Mapping[str, Any]
    ) -> openvino.CompiledModel:
        """The graph as OpenVINO compiles it under its settings `config`."""
        model = self._core.read_model(self._translated(schedule))
        model.reshape([batch_size, 3, *self.input_size])
        if precision == "bf16":
            to_bfloat16(model)
        return self._core.compile_model(model, "CPU", dict(config))

    def translate_aside(self, schedule: Schedule) -> None:
        """Makes the schedule's graph by a process of its own, so that answers go on.

        While torch traces a model, a forward pass in any other thread fails, and so does the tracing.

        Raises:
            RuntimeError: It cannot be translated; the process has said why.
        """
        file = self._file(schedule)
        if file.exists():
            return
        # Pickled here: multiprocessing would put the weights in shared memory, of which a container has 64 MB.
        args = (pickle.dumps(self._merged), schedule, self.input_size, file, self._operator)
        process = multiprocessing.get_context("spawn").Process(target=_translate_pickled, args=args, name="translation")
        process.start()
        process.join()
        if not file.exists():
            raise RuntimeError(f"its translation ended with status {process.exitcode}")

    def _translated(self, schedule: Schedule) -> Path:
        """The schedule's graph as a file: the one that is there, or a new one."""
        file = self._file(schedule)
        if not file.exists():
            _translate(self._merged, schedule, self.input_size, file, self._operator)
        return file

    def _built(self, folder: Path) -> Path | None:
        """The compiled operator, or None where OpenVINO's own operators have to do."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            operator = build_operator(folder)
            self._core.add_extension(operator)
        except (RuntimeError, OSError) as error:  # OperatorError, or a folder that is full
            logger.info("OpenVINO merges by its own operators, which takes longer: %s", error)
            return None
        return operator

    def _file(self, schedule: Schedule) -> Path:
        return self._folder / f"r{text_of(r_of(schedule)).replace(',', '-')}.xml"


def _translate_pickled(
    merged: bytes, schedule: Schedule, input_size: tuple[int, int], file: Path, operator: Path | None
) -> None:
    end_with_parent()
    _translate(pickle.loads(merged), schedule, input_size, file, operator)


@torch.no_grad()
def _translate(
    merged: tome_core.MergedViT, schedule: Schedule, input_size: tuple[int, int], file: Path, operator: Path | None
) -> None:
    model = to_openvino(merged, schedule, input_size, operator)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        written = Path(folder) / file.name
        save(model, written)
        written.with_suffix(".bin").replace(file.with_suffix(".bin"))
        written.replace(file)  # last: where it is, all is


def _fingerprint(merged: tome_core.MergedViT, input_size: tuple[int, int], operator: Path | None) -> str:
    """A name for all that a graph depends on but the schedule: weights, layers, versions, and our own code."""
    digest = hashlib.sha256()
    for name, tensor in merged.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    digest.update(repr((merged.model, input_size, operator and operator.name)).encode())
    digest.update(repr((openvino.__version__, torch.__version__, timm.__version__)).encode())
    for file in sorted(Path(tome_core.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:24]
