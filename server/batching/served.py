"""The models that an engine serves, and those that it has just retired."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from server.batching.auto import AutoDial
from server.batching.drift import DriftWatch
from server.batching.loader import Loaded
from server.batching.policy import Rung
from server.batching.speed import Speed
from server.config.store import ConfigStore
from server.curve import Curve
from server.dial import PlainR, RSetting
from server.errors import UnavailableError
from server.ipc.messages import Request
from server.metrics import MODELS_LOADED
from server.types import BatchKey, ModelInfo, find_model


class Served:
    """One model as requests find it.

    Args:
        info: Its description.
        dial: Its `r=auto`.
        curve: Its curve.

    Attributes:
        key: The batch key of an `r` and an operation.
        start: After it is retired: the `r` that it was started with.
        r: After it is retired: its last deployment `r`.
    """

    def __init__(self, info: ModelInfo, dial: AutoDial, curve: Curve | None) -> None:
        self.info, self.dial, self.curve = info, dial, curve
        self.key = functools.lru_cache(1024)(self._made_key)
        self.start: RSetting = 0
        self.r: RSetting | None = None

    def _made_key(self, r: PlainR, operation: str) -> BatchKey:
        return self.info.batch_key(self.info.schedule(r), operation)


class ServedModels:
    """Finds the model of a request. A replaced or unloaded model still answers requests prepared for it.

    Args:
        models: The loaded models, the default first. It is kept up to date.
        store: The deployment `r` of each.
        speed: Gets the expected times of their batches.
        drift: Gets their curves.
        changed: Called after a model was added or removed.

    Raises:
        InvalidError: A model's deployment `r` is out of its range.
    """

    def __init__(
        self,
        models: dict[str, ModelInfo],
        store: ConfigStore,
        speed: Speed[BatchKey],
        drift: DriftWatch,
        changed: Callable[[], None],
        steps: Mapping[str, Sequence[Rung]],
        curves: Mapping[str, Curve],
    ) -> None:
        self.models, self._store, self._speed, self._drift, self._changed = models, store, speed, drift, changed
        self._order = list(models)
        self._served: dict[str, Served] = {}
        self._retired: dict[tuple[str, str], Served] = {}
        for name, info in models.items():
            info.check(store.configuration.models[name])
            self._served[name] = self._made(info, steps.get(name), curves.get(name))
        MODELS_LOADED.set(len(models))

    def find(self, request: Request[Any]) -> Served:
        """The model that a request was prepared for; by its name alone if the request has no revision.

        Raises:
            NotFoundError: There is no such model.
            UnavailableError: The model was replaced, and the images were prepared for the old one.
        """
        served = self._served.get(request.model)
        if served is not None and request.revision in ("", served.info.revision):
            return served
        retired = self._retired.get((request.model, request.revision))
        if retired is None:
            find_model(self.models, request.model)
            raise UnavailableError(f"model {request.model} was replaced meanwhile; ask again", retry_after_s=1)
        return retired

    def curve(self, name: str) -> Curve | None:
        """The curve of a model that serves."""
        return self._served[name].curve

    def deployed(self, name: str, start: RSetting) -> RSetting:
        """The deployment `r` of a model whose settings say `start`."""
        return self._store.setting(name, start)

    def adopt(self, loaded: Loaded) -> None:
        """Puts a model into service, and retires one of the same name in the same step.

        Raises:
            InvalidError: It cannot merge by its deployment `r`; nothing changes.
        """
        info = loaded.info
        info.check(self.deployed(info.name, loaded.r))
        self._retire(info.name)
        self._serve(self._made(info, loaded.steps, loaded.curve), loaded.r)

    def readopt(self, name: str, revision: str) -> bool:
        """Puts a retired model back into service; returns False if it is unknown or being freed."""
        retired = self._retired.get((name, revision))
        if retired is None:
            return False
        retired.info.check(self.deployed(name, retired.start))
        self._retire(name)
        del self._retired[name, revision]
        if retired.curve is not None:
            self._drift.expect(name, retired.curve)
        self._serve(retired, retired.start)
        return True

    def retire(self, name: str) -> None:
        """Takes a model out of the catalog. Only requests prepared for it still reach it."""
        self._retire(name)
        self._tell()

    def forget(self, info: ModelInfo) -> None:
        """Stops requests from reaching a retired model."""
        del self._retired[info.name, info.revision]

    def _made(self, info: ModelInfo, steps: Sequence[Rung] | None, curve: Curve | None) -> Served:
        if curve is not None:
            for row in curve.rows:  # every row, also those that `auto` does not choose
                assert row.line is not None, "the speeds of a curve that is served are known"
                self._speed.expect(info.batch_key(row.r), *row.line)
            self._drift.expect(info.name, curve)
        return Served(info, AutoDial(info.batch_key, steps or [Rung(info.schedule(0))], self._speed), curve)

    def _serve(self, served: Served, start: RSetting) -> None:
        """Adds a model to the catalog. The models of the start keep their order; others follow in order of first
        arrival.
        """
        name, served.r = served.info.name, None
        self._store.add(name, start)
        self._served[name] = served
        if name not in self._order:
            self._order.append(name)
        self.models.clear()
        self.models.update({name: self._served[name].info for name in self._order if name in self._served})
        self._tell()

    def _retire(self, name: str) -> None:
        served = self._served.pop(name, None)
        if served is None:
            return
        del self.models[name]
        served.r = self._store.configuration.models[name]
        served.start = self._store.remove(name)
        self._retired[name, served.info.revision] = served
        self._drift.forget(name)

    def _tell(self) -> None:
        MODELS_LOADED.set(len(self.models))
        self._changed()
