"""Models compiled by OpenVINO, for each schedule, batch size and precision.

A translation takes seconds, because torch traces the model. If merging is one compiled operator, there are two
translations: one for r=0, and one for all schedules that merge (`tome_core.openvino_schedules`). Otherwise each
schedule has its own. Translations are kept on disk. Compiled graphs are not: to read one takes half of the time of a
compilation, and each is as large as the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import pickle
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import tome_core
from server.cpus import available_cpus
from server.device import translation
from server.device.openvino_files import Translations, make_room, touch
from server.device.openvino_graphs import (
    BATCH_SIZES,
    GRAPH_PER_WEIGHTS,
    AnyBatch,
    Run,
    any_batch,
    config_of,
    run_of,
)
from server.dial import Schedule, r_of, text_of
from tome_core.openvino import save, to_openvino
from tome_core.openvino_core import add_operator, core
from tome_core.openvino_operator import build_operator, to_bfloat16
from tome_core.openvino_schedules import name_no_tokens, set_schedule
from tome_core.quiet import openvino
from tome_core.schedule import mean_r

logger = logging.getLogger(__name__)

TRACING = threading.Lock()
"""Held while torch traces a model, and by other threads while they run or read one. Otherwise both fail."""


Work = tuple[tome_core.MergedViT, Schedule, bool, tuple[int, int], Path, Path | None]
"""The arguments of `translate`."""


class Compiler:
    """Turns a model into callables, one for a schedule, a batch size and a precision.

    Args:
        merged: The merging model, in eval mode and float32.
        input_size: Height and width of its images.
        threads: CPU threads; 0 takes all that the container may use.
        cache_dir: The folder that keeps translations for the next start; None keeps them for this process only.
        beside: Whether other models compute in this process. All translations are then made in another process.

    Attributes:
        input_size: As given.
        threads: Number of CPU threads.
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
        self._differs: set[Schedule] = set()
        """Schedules whose graph differs from the common one in more than `r`."""
        self._process: subprocess.Popen[bytes] | None = None
        self._aside, self._starting = threading.Lock(), threading.Lock()
        self._is_closed = False
        self._files = Translations(cache_dir / _fingerprint(merged, input_size, self._operator))
        make_room(cache_dir)

    @property
    def has_bf16(self) -> bool:
        """Whether the CPU computes in bf16 itself."""
        return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    @property
    def folder(self) -> Path:
        """The folder of translations for this model, these package versions and this code."""
        return self._files.folder

    @property
    def graph_bytes(self) -> int:
        """Memory that a compiled graph takes, at most."""
        return GRAPH_PER_WEIGHTS * sum(4 * each.numel() for each in self._merged.model.parameters())

    def keep(self, schedule: Schedule) -> None:
        """Protects the translation of a schedule from removal when disk space is short."""
        self._files.keep(self._name(schedule))

    def close(self) -> None:
        """Kills a translation in another process, and starts no others."""
        with self._starting:
            self._is_closed = True
            if self._process is not None:
                self._process.kill()

    def any_batch(
        self,
        schedule: Schedule,
        max_batch_size: int,
        precision: str,
        sizes: Sequence[int] | None = None,
        aside: bool = False,
    ) -> AnyBatch:
        """Compiles a schedule for any number of images up to `max_batch_size`.

        Args:
            schedule: `r` of each block.
            max_batch_size: Most images at a time.
            precision: "fp32" or "bf16".
            sizes: Batch sizes that run side by side; None takes all useful ones. The graph for a single image is always
                compiled, and computes the remainder.
            aside: Whether to translate in another process, so that answers go on.

        Raises:
            RuntimeError: It cannot be translated or compiled.
        """

        def graph(size: int, side_by_side: int) -> Run:
            return self.graph(schedule, size, precision, side_by_side, aside)

        return any_batch(graph, self.threads, max_batch_size, BATCH_SIZES[precision] if sizes is None else sizes)

    def graph(
        self, schedule: Schedule, batch_size: int, precision: str, side_by_side: int = 1, aside: bool = False
    ) -> Run:
        """Compiles one graph.

        Args:
            schedule: `r` of each block.
            batch_size: Images that it takes.
            precision: "fp32" or "bf16".
            side_by_side: Number of batches that run at a time, each on a share of the threads.
            aside: Whether to translate in another process.

        Returns:
            A function of any multiple of `batch_size` images.
        """
        config = config_of(precision, self.threads, side_by_side)
        return run_of(self.compiled(schedule, batch_size, precision, config, aside), batch_size, side_by_side)

    def compiled(
        self, schedule: Schedule, batch_size: int, precision: str, config: Mapping[str, Any], aside: bool = False
    ) -> openvino.CompiledModel:
        """The graph as OpenVINO compiles it under its settings `config`."""
        model = self._translated(schedule, aside)
        if self._name(schedule) == self._common(schedule):
            try:
                set_schedule(model, schedule)
            except RuntimeError as error:
                logger.info("r=%s has a translation of its own: %s", text_of(r_of(schedule)), error)
                self._differs.add(schedule)
                model = self._translated(schedule, aside)
        model.reshape([batch_size, 3, *self.input_size])
        if precision == "bf16":
            to_bfloat16(model)
        return core().compile_model(model, "CPU", dict(config))

    def _name(self, schedule: Schedule) -> str:
        """The name of the translation for a schedule."""
        is_common = self._operator is not None and max(schedule) > 0 and schedule not in self._differs
        return self._common(schedule) if is_common else f"r{text_of(r_of(schedule)).replace(',', '-')}"

    def _common(self, schedule: Schedule) -> str:
        """The name of the translation that all schedules share, or all of one band of tuned numbers."""
        mean = mean_r(schedule)
        bands = self._merged.tuned.bands if self._merged.tuned else ()
        band = next((f"-{band.low}-{band.high}" for band in bands if mean in band), "")
        return f"merging{band}"

    def translate_ahead(self, schedule: Schedule) -> None:
        """Starts the common translation of schedules that merge, in another process."""
        name = self._name(schedule)
        if name != self._common(schedule) or self._files.graph(name).exists():
            return
        work = self._pickled(schedule, name)  # now, because this thread may trace soon

        def translate() -> None:
            with contextlib.suppress(RuntimeError):  # the first compilation tries again, and reports the error
                self._translate_aside(name, work)

        threading.Thread(target=translate, name="translation", daemon=True).start()

    def _translated(self, schedule: Schedule, aside: bool) -> openvino.Model:
        """The translation for a schedule, from disk or made now."""
        name = self._name(schedule)
        if self._files.use(name):
            try:
                return core().read_model(self._files.graph(name))
            except RuntimeError as error:  # another server has removed it, or it is damaged after a crash
                logger.info("%s is translated again: %s", name, error)
                self._files.remove(name)
        if aside or self._beside:
            self._translate_aside(name, self._pickled(schedule, name))
        else:
            with TRACING:
                translate(*self._work(schedule, name))
        make_room(self._files.folder.parent, self._files.kept | {self._files.graph(name)})
        return core().read_model(self._files.graph(name))

    def _work(self, schedule: Schedule, name: str) -> Work:
        """The arguments of `translate` for a translation."""
        is_common, file = name == self._common(schedule), self._files.graph(name)
        return self._merged, schedule, is_common, self.input_size, file, self._operator

    def _pickled(self, schedule: Schedule, name: str) -> bytes:
        """The work for another process, because no thread may run a model while torch traces one."""
        with TRACING:
            return pickle.dumps(self._work(schedule, name))

    def _translate_aside(self, name: str, work: bytes) -> None:
        """Makes a translation in another process, unless another thread has just made it.

        Raises:
            RuntimeError: It cannot be translated. The other process has logged why.
        """
        with self._aside:
            if self._files.use(name):
                return
            with self._starting:
                if self._is_closed:
                    raise RuntimeError("the model is unloaded, or the server ends")
                process = self._process = translation.start()
            status = translation.finish(process, work)
            self._process = None
        if status != 0:
            raise RuntimeError(f"its translation ended with status {status}")

    def _built(self, folder: Path) -> Path | None:
        """The compiled operator; None if it cannot be built. Then OpenVINO's own operators merge."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            operator = build_operator(folder)
            add_operator(operator)
        except (RuntimeError, OSError) as error:  # OperatorError, or a folder that is full
            logger.info("OpenVINO merges by its own operators, which takes longer: %s", error)
            return None
        if operator.parent == folder:
            touch(operator)
        return operator


@torch.no_grad()
def translate(
    merged: tome_core.MergedViT,
    schedule: Schedule,
    is_common: bool,
    input_size: tuple[int, int],
    file: Path,
    operator: Path | None,
) -> None:
    """Translates a model for one schedule, or for all schedules that share its weights."""
    if is_common:
        numbers = tome_core.MergedViT(merged.at(schedule).model)
        numbers = numbers.with_features() if merged.gives_features else numbers
        model = to_openvino(numbers, 1, input_size, operator)
        name_no_tokens(model)
    else:
        model = to_openvino(merged, schedule, input_size, operator)
    file.parent.mkdir(parents=True, exist_ok=True)  # another server may have removed it
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        written = Path(folder) / file.name
        save(model, written)
        written.with_suffix(".bin").replace(file.with_suffix(".bin"))
        written.replace(file)  # last, because its presence means that all is there


def _fingerprint(merged: tome_core.MergedViT, input_size: tuple[int, int], operator: Path | None) -> str:
    """A hash of what a graph depends on besides the schedule: weights, tuned numbers, layers, versions, our code."""
    digest = hashlib.sha256()
    parts = list(merged.model.state_dict().items())
    for band in merged.tuned.bands if merged.tuned else ():
        parts += [(f"{band.low}-{band.high}.{name}", tensor) for name, tensor in band.tensors.items()]
    for name, tensor in parts:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    digest.update(repr((merged.model, input_size, operator is not None)).encode())
    digest.update(repr((openvino.__version__, torch.__version__, timm.__version__)).encode())
    for file in sorted(Path(tome_core.__file__).parent.rglob("*")):
        if file.suffix in (".py", ".cpp"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:24]
