"""Models compiled by OpenVINO: translated once, compiled for each schedule, batch size and precision, kept on disk."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import pickle
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

import tome_core
from server.cpus import available_cpus
from server.device.openvino_files import Translations, remove_outdated, touch
from server.device.openvino_graphs import (
    BATCH_SIZES,
    FEWER_BATCH_SIZES,
    GRAPH_PER_WEIGHTS,
    AnyBatch,
    Run,
    any_batch,
    config_of,
    run_of,
)
from server.dial import Schedule, r_of, text_of
from server.lifetime import end_with_parent
from tome_core.openvino import save, to_openvino
from tome_core.openvino_core import add_operator, core
from tome_core.openvino_operator import build_operator, to_bfloat16
from tome_core.quiet import openvino

logger = logging.getLogger(__name__)

TRACING = threading.Lock()
"""Held while torch traces a model in this process, and by another thread while it runs or reads one: both fail else."""


class Compiler:
    """Turns a model into callables, one for a schedule, a batch size and a precision.

    Args:
        merged: The merging model, in eval mode and float32.
        input_size: Height and width of its images.
        threads: CPU threads; 0 takes what the container may use.
        cache_dir: Where translated and compiled graphs are kept for the next start, so many of them; None keeps them
            for this process.
        beside: Others compute in this process: all that is translated is translated in another one.

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
        beside: bool = False,
    ) -> None:
        self.input_size = input_size
        self._beside = beside
        self.threads = threads or available_cpus()
        self._merged = merged
        if cache_dir is None:
            cache_dir = Path(tempfile.mkdtemp(prefix="tome-server-openvino-"))
            weakref.finalize(self, shutil.rmtree, cache_dir, ignore_errors=True)
        self._operator = self._built(cache_dir)
        self._files = Translations(cache_dir / _fingerprint(merged, input_size, self._operator))
        remove_outdated(cache_dir)

    @property
    def has_bf16(self) -> bool:
        """Whether the CPU computes in bf16 itself."""
        return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def keep(self, schedule: Schedule) -> None:
        """Keeps what is made of a schedule on disk whatever else is made."""
        self._files.keep(schedule)

    @property
    def graph_bytes(self) -> int:
        """Memory that a compiled graph takes, at most."""
        return GRAPH_PER_WEIGHTS * sum(4 * each.numel() for each in self._merged.model.parameters())

    def any_batch(self, schedule: Schedule, max_batch_size: int, precision: str, aside: bool = False) -> AnyBatch:
        """Compiles a schedule for any number of images up to `max_batch_size`, or takes it from the cache.

        Args:
            schedule: `r` of each block.
            max_batch_size: Most images at a time.
            precision: "fp32" or "bf16".
            aside: Translates it in a process of its own, so that answers go on, and compiles it for fewer batch sizes.

        Raises:
            RuntimeError: It cannot be translated or compiled.
        """

        def graph(size: int, side_by_side: int) -> Run:
            return self.graph(schedule, size, precision, side_by_side, aside)

        sizes = FEWER_BATCH_SIZES if aside else BATCH_SIZES[precision]
        return any_batch(graph, self.threads, max_batch_size, sizes)

    def graph(
        self, schedule: Schedule, batch_size: int, precision: str, side_by_side: int = 1, aside: bool = False
    ) -> Run:
        """Compiles one graph, or takes it from the cache.

        Args:
            schedule: `r` of each block.
            batch_size: Images that it takes.
            precision: "fp32" or "bf16".
            side_by_side: How many of it run at a time, with a share of the threads each.
            aside: Translates it in a process of its own.

        Returns:
            A function of any multiple of `batch_size` images.
        """
        config = config_of(precision, self.threads, side_by_side) | {
            "CACHE_DIR": str(self._files.compiled(schedule)),
            "CACHE_MODE": "OPTIMIZE_SIZE",  # weights come from the translation
        }
        compiled = self.compiled(schedule, batch_size, precision, config, aside)
        return run_of(compiled, batch_size, side_by_side)

    def compiled(
        self, schedule: Schedule, batch_size: int, precision: str, config: Mapping[str, Any], aside: bool = False
    ) -> openvino.CompiledModel:
        """The graph as OpenVINO compiles it under its settings `config`."""
        if self._files.use(schedule):
            try:
                return self._read(schedule, batch_size, precision, config)
            except RuntimeError as error:  # another server has removed it by now, or a crash has spoilt it
                logger.info("r=%s is translated again: %s", text_of(r_of(schedule)), error)
        self._files.remove(schedule)
        self._translate(schedule, aside or self._beside)
        self._files.make_room()
        return self._read(schedule, batch_size, precision, config)

    def _read(
        self, schedule: Schedule, batch_size: int, precision: str, config: Mapping[str, Any]
    ) -> openvino.CompiledModel:
        """Raises RuntimeError where the files are not there, or hold no graph."""
        model = core().read_model(self._files.graph(schedule))
        model.reshape([batch_size, 3, *self.input_size])
        if precision == "bf16":
            to_bfloat16(model)
        return core().compile_model(model, "CPU", dict(config))

    def _translate(self, schedule: Schedule, aside: bool) -> None:
        """Makes the schedule's graph.

        Aside, it is a process that does, since no thread may run a model while torch traces one.

        Raises:
            RuntimeError: It cannot be translated; the process has said why.
        """
        file = self._files.graph(schedule)
        if not aside:
            with TRACING:
                _translate(self._merged, schedule, self.input_size, file, self._operator)
            return
        with TRACING:
            # Here: multiprocessing would put the weights in shared memory, of which a container has 64 MB.
            merged = pickle.dumps(self._merged)
        args = (merged, schedule, self.input_size, file, self._operator)
        process = multiprocessing.get_context("spawn").Process(target=_translate_pickled, args=args, name="translation")
        process.start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"its translation ended with status {process.exitcode}")

    def _built(self, folder: Path) -> Path | None:
        """The compiled operator, or None where OpenVINO's own operators have to do."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            operator = build_operator(folder)
            add_operator(operator)
        except (RuntimeError, OSError) as error:  # OperatorError, or a folder that is full
            logger.info("OpenVINO merges by its own operators, which takes longer: %s", error)
            return None
        touch(operator)
        return operator


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
    file.parent.mkdir(parents=True, exist_ok=True)  # another server may have removed it
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        written = Path(folder) / file.name
        save(model, written)
        written.with_suffix(".bin").replace(file.with_suffix(".bin"))
        written.replace(file)  # last: where it is, all is


def _fingerprint(merged: tome_core.MergedViT, input_size: tuple[int, int], operator: Path | None) -> str:
    """A name for all that a graph depends on but the schedule: weights, tuned numbers, layers, versions, our code."""
    digest = hashlib.sha256()
    parts = list(merged.model.state_dict().items())
    for band in merged.tuned.bands if merged.tuned else ():
        parts += [(f"{band.low}-{band.high}.{name}", tensor) for name, tensor in band.tensors.items()]
    for name, tensor in parts:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    digest.update(repr((merged.model, input_size, operator and operator.name)).encode())
    digest.update(repr((openvino.__version__, torch.__version__, timm.__version__)).encode())
    for file in sorted(Path(tome_core.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:24]
