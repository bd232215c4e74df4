"""The engine's device: the computation of each operation, after the images are prepared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from server.device.explainer import Explainer
from server.device.fitting import Fitting
from server.device.outcome import wanted_by
from server.device.prepared import PixelBatch, Prepared, is_whole, joined
from server.device.preparing import Preparer
from server.device.runner import Runner
from server.errors import ServerError
from server.ipc.messages import Item, Merges, TopK, Vector
from server.types import BatchKey, Compiling, ComputedBy, OnDevice, OnTimed

logger = logging.getLogger(__name__)

Result = TopK | Vector | Merges
Compute = Callable[[BatchKey, Sequence[Prepared]], Sequence[Result]]


class Device:
    """Prepares and computes batches; a batch that does not fit into memory is split.

    Args:
        runner: Computes a model's outputs.
        explainer: Finds the groups of merged patches; None if no request needs it.
        preparer: Turns files into pixels in a separate stage; None if every image comes as pixels.
        background: Begins the model's background work; None if there is none.
    """

    def __init__(
        self,
        runner: Runner,
        explainer: Explainer | None,
        preparer: Preparer | None = None,
        background: Callable[[OnDevice, OnTimed], None] | None = None,
    ) -> None:
        self._background = background
        self._runner, self._explainer = runner, explainer
        self._prepare = Fitting(preparer) if preparer is not None else None
        operations: dict[str, Compute] = {"forward": runner.forward}
        if explainer is not None:
            operations["explain"] = explainer.explain
        self._operations = {name: Fitting(compute) for name, compute in operations.items()}

    @property
    def prepares(self) -> bool:
        return self._prepare is not None

    def prepare(self, key: BatchKey, items: Sequence[Item]) -> Sequence[Prepared | ServerError]:
        """Images that are ready to be computed, and the errors of those that cannot be decoded."""
        assert self._prepare is not None
        with self._runner.alone:
            prepared = self._prepare(key, items)
            if key.operation == "forward":
                self._launch_ahead(key, [each for each in prepared if isinstance(each, Prepared)])
        return prepared

    def _launch_ahead(self, key: BatchKey, prepared: Sequence[Prepared]) -> None:
        """Queues this batch on the device behind the previous one, so that the device never waits for the host."""
        if not prepared or not is_whole(prepared) or not self._runner.is_quick(key, len(prepared)):
            return
        batch = prepared[0].batch
        try:
            batch.launched = self._runner.launch(key, batch.pixels, wanted_by([each.item for each in prepared]))
        except Exception:  # `compute` tries again, in smaller parts if memory was the reason
            logger.exception("a batch of %d could not be launched ahead", len(prepared))

    def compute(self, key: BatchKey, work: Sequence[Any]) -> Sequence[Result]:
        """The result of each image, from `Prepared`, or from items if nothing prepares them."""
        if self._prepare is None:
            batch = PixelBatch(joined(work, key.input_size, self._runner.device))
            work = [Prepared(item, batch, row) for row, item in enumerate(work)]
        return self._operations[key.operation](key, work)

    def computed_by(self, key: BatchKey) -> ComputedBy:
        """The backend that would compute a batch of this key now; right after `compute`, the one that did."""
        if key.operation == "explain" and self._explainer is not None:
            return self._explainer.computed_by(key)
        return self._runner.computed_by(key)

    def compiling(self, model: str) -> Compiling | None:
        """The progress of the model's background compilation; None without one."""
        return self._runner.compiling(model)

    def begin(self, on_device: OnDevice, timed: OnTimed) -> None:
        """Starts the background work."""
        if self._background is not None:
            self._background(on_device, timed)

    def close(self) -> None:
        """Ends the background work."""
        self._runner.close()

    def check(self) -> None:
        self._runner.check()

    def warm_further(self) -> bool:
        """Does one more piece of work that makes later batches faster; returns False if none is left."""
        return self._runner.warm_further()
