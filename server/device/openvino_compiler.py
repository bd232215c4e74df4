"""Models compiled by OpenVINO, for each schedule, batch size and precision.

Torch traces a model for seconds to translate it. Where merging is one compiled operator, that is done twice: for r=0,
and for all schedules that merge (`tome_core.openvino_schedules`). Elsewhere each schedule has a translation of its own.
Translations are kept on disk. Compiled graphs are not: OpenVINO reads one in half of the time that it takes to compile
one, and each takes the space of the weights.
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
"""Held while torch traces a model in this process, and by another thread while it runs or reads one: both fail else."""


class Compiler:
    """Turns a model into callables, one for a schedule, a batch size and a precision.

    Args:
        merged: The merging model, in eval mode and float32.
        input_size: Height and width of its images.
        threads: CPU threads; 0 takes what the container may use.
        cache_dir: Where translations are kept for the next start; None keeps them for this process.
        beside: Other models compute in this process: all translations are made in another one.

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
        """What is kept of this model, these versions and this code."""
        return self._files.folder

    @property
    def graph_bytes(self) -> int:
        """Memory that a compiled graph takes, at most."""
        return GRAPH_PER_WEIGHTS * sum(4 * each.numel() for each in self._merged.model.parameters())

    def keep(self, schedule: Schedule) -> None:
        """Never removes the translation of a schedule to make room on disk."""
        self._files.keep(self._name(schedule))

    def close(self) -> None:
        """Ends a translation in another process; nothing is translated there any more."""
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
            sizes: Batch sizes that run side by side; None takes all that pay. The graph for a lone image is always
                there, and does for what they leave.
            aside: Translates it in a process of its own, so that answers go on.

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
            side_by_side: How many of it run at a time, with a share of the threads each.
            aside: Translates it in a process of its own.

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
        """What the translation is called that a schedule is made of."""
        is_common = self._operator is not None and max(schedule) > 0 and schedule not in self._differs
        return self._common(schedule) if is_common else f"r{text_of(r_of(schedule)).replace(',', '-')}"

    def _common(self, schedule: Schedule) -> str:
        """What the translation is called that schedules share: all, or all of one band of tuned numbers."""
        mean = mean_r(schedule)
        bands = self._merged.tuned.bands if self._merged.tuned else ()
        band = next((f"-{band.low}-{band.high}" for band in bands if mean in band), "")
        return f"merging{band}"

    def translate_ahead(self, schedule: Schedule) -> None:
        """Begins what schedules that merge are made of, in another process, while this one does something else."""
        if self._name(schedule) == self._common(schedule) and not self._files.graph(self._name(schedule)).exists():
            merged = self._pickled()  # now: soon this thread may trace

            def translate() -> None:
                with contextlib.suppress(RuntimeError):  # whoever needs it tries again, and says what is wrong
                    self._translate(schedule, self._name(schedule), merged)

            threading.Thread(target=translate, name="translation", daemon=True).start()

    def _translated(self, schedule: Schedule, aside: bool) -> openvino.Model:
        """The translation that a schedule is made of, from the disk or made now."""
        name = self._name(schedule)
        if self._files.use(name):
            try:
                return core().read_model(self._files.graph(name))
            except RuntimeError as error:  # another server has removed it by now, or a crash has spoilt it
                logger.info("%s is translated again: %s", name, error)
                self._files.remove(name)
        self._translate(schedule, name, self._pickled() if aside or self._beside else None)
        make_room(self._files.folder.parent, self._files.kept | {self._files.graph(name)})
        return core().read_model(self._files.graph(name))

    def _pickled(self) -> bytes:
        """The model. multiprocessing would put its weights in shared memory, of which a container has 64 MB."""
        with TRACING:
            return pickle.dumps(self._merged)

    def _translate(self, schedule: Schedule, name: str, merged: bytes | None) -> None:
        """Makes a translation, where it is not there by now.

        Args:
            schedule: For which.
            name: What it is called.
            merged: The pickled model for a process that translates, since no thread may run a model while torch traces
                one; None translates here.

        Raises:
            RuntimeError: It cannot be translated; the process has said why.
        """
        file, is_common = self._files.graph(name), name == self._common(schedule)
        if merged is None:
            with TRACING:
                translate(self._merged, schedule, is_common, self.input_size, file, self._operator)
            return
        args = (merged, schedule, is_common, self.input_size, file, self._operator)
        with self._aside:
            if not self._files.use(name):
                self._translate_aside(args)

    def _translate_aside(self, args: tuple[Any, ...]) -> None:
        with self._starting:
            if self._is_closed:
                raise RuntimeError("the model is unloaded, or the server ends")
            process = self._process = translation.start()
        status = translation.finish(process, *args)
        self._process = None
        if status != 0:
            raise RuntimeError(f"its translation ended with status {status}")

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


@torch.no_grad()
def translate(
    merged: tome_core.MergedViT,
    schedule: Schedule,
    is_common: bool,
    input_size: tuple[int, int],
    file: Path,
    operator: Path | None,
) -> None:
    """Translates a model for a schedule, or for all that merge by the same numbers."""
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
