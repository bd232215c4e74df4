"""A loader of made-up models, which a test can hold or let fail, and an engine that has it."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from server.batching.engine import LocalEngine
from server.batching.loader import Found, Loaded
from server.batching.policy import Rung
from server.config.local import LocalConfig
from server.curve import Curve
from server.dial import RSetting
from server.errors import NotFoundError, SettingsError
from server.types import ModelInfo, OnDevice
from tests.server.conftest import FakeDevice, model_info

TINY, TINY_2 = model_info("tiny", revision="t1"), model_info("tiny", version="2", revision="t2", max_r=4)
CATS = model_info("cats", revision="c1")


class FakeLoader:
    """Loads models while its gate is open.

    Attributes:
        on_disk: What may be loaded.
        loads: Every model that it began to load, and the `r` that it was to be warmed for.
        freed: Every model that it freed.
        threads: Those on which it used the device.
    """

    def __init__(self, on_disk: Iterable[ModelInfo] = (TINY, TINY_2, CATS)) -> None:
        self.on_disk = list(on_disk)
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.steps: list[Rung] = []
        self.curve: Curve | None = None
        self.loads: list[tuple[ModelInfo, RSetting]] = []
        self.freed: list[ModelInfo] = []
        self.threads: set[str] = set()

    def find(self, name: str, version: str | None) -> Found:
        versions = {info.version: info for info in self.on_disk if info.name == name}
        if not versions:
            raise NotFoundError(f"there is no model {name!r} to load")
        if version not in (None, *versions):
            raise SettingsError(f"model {name} has no version {version}")
        info = versions[max(versions) if version is None else version]
        return Found(name, info.version, info.revision, 0)

    def load(self, found: Found, r: RSetting, on_device: OnDevice) -> Loaded:
        (info,) = (info for info in self.on_disk if (info.name, info.revision) == (found.name, found.revision))
        self.loads.append((info, r))
        self.gate.wait()
        if self.failure is not None:
            raise self.failure
        on_device(lambda: self.threads.add(threading.current_thread().name))
        return Loaded(info, found.r, self.steps, self.curve)

    def free(self, info: ModelInfo) -> None:
        self.threads.add(threading.current_thread().name)
        self.freed.append(info)

    def available(self) -> dict[str, list[str]]:
        names = dict.fromkeys(info.name for info in self.on_disk)
        return {name: [info.version for info in self.on_disk if info.name == name] for name in names}


class FakeKept(dict[str, str | None]):
    """Keeps what came and went, and the calls that asked for it."""

    def __init__(self, **entries: str | None) -> None:
        super().__init__(entries)
        self.calls: list[tuple[str, str | None]] = []

    def entries(self) -> dict[str, str | None]:
        return dict(self)

    def keep(self, name: str, version: str | None) -> None:
        self[name] = version
        self.calls.append((name, version))


@asynccontextmanager
async def loading(
    device: FakeDevice,
    loader: FakeLoader,
    *models: ModelInfo,
    r: RSetting = 0,
    state_file: Path | None = None,
    **options: Any,
) -> AsyncIterator[LocalEngine]:
    """An engine that serves some models and loads others."""
    catalog = {info.name: info for info in models or [TINY]}
    store = LocalConfig(dict.fromkeys(catalog, r), state_file)
    engine = LocalEngine(catalog, device, store, loader=loader, **options)
    engine.start()
    try:
        yield engine
    finally:
        device.gate.set()
        loader.gate.set()
        await engine.close()
