"""Whatever becomes of the source of the configuration, at whatever moment: the last good one goes on.

Every kind of garbage x every source x every moment. A new source is one more class in `SOURCES`, a new kind one more
line in `KINDS`; `test_every_keeper_is_in_the_table` fails for a keeper of the configuration that is not there.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
import os
import pkgutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, ClassVar, Protocol

import fakeredis
import pytest
import redis
from prometheus_client import REGISTRY

import server.config
from server.config import in_redis, watched
from server.config.files import MOST_BYTES
from server.config.in_redis import KEY, RedisConfig
from server.config.local import LocalConfig
from server.config.pushed import PushedConfig
from server.config.store import ConfigStore
from server.config.watched import WatchedFile
from server.dial import RSetting
from server.types import Configuration, find_model
from server.unnamed import UnnamedFile
from tests.server.conftest import model_info, until

MODELS = {"tiny": model_info("tiny"), "large": model_info("large")}
START: dict[str, RSetting] = {"tiny": 0, "large": 2}
GOOD, NEXT = 8, 3
MOMENTS = ("while it is followed", "at a restart of the engine", "at a restart of the server")


def check(models: Mapping[str, RSetting]) -> None:
    for name, r in models.items():
        find_model(MODELS, name).check(r)


class Source(Protocol):
    """Where a configuration comes from, as a test spoils it."""

    heals: ClassVar[frozenset[str]]
    """Kinds that the server mends by itself: then it is not stale."""

    longest: ClassVar[int]
    """Bytes beyond which a document is too long."""

    def open(self, memory: UnnamedFile | None) -> ConfigStore:
        """A server starts on it."""
        ...

    def document(self, r: int) -> bytes:
        """What says that r."""
        ...

    def put(self, content: bytes) -> None:
        """Somebody writes that."""
        ...

    def remove(self) -> None:
        """Somebody removes it."""
        ...

    def is_there(self) -> bool:
        """Whether there is any document."""
        ...

    def other(self) -> None:
        """Something else takes its place, from which nothing can be read."""
        ...


class File:
    heals: ClassVar[frozenset[str]] = frozenset()
    longest: ClassVar[int] = MOST_BYTES

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.file"
        self.state = folder / "state"
        self.versions = iter(range(5, 10**6))

    def put(self, content: bytes) -> None:
        self.remove()
        new = self.path.with_suffix(".new")
        new.write_bytes(content)
        new.replace(self.path)

    def remove(self) -> None:
        if self.path.is_dir():
            self.path.rmdir()
        self.path.unlink(missing_ok=True)

    def is_there(self) -> bool:
        return self.path.exists()

    def other(self) -> None:
        self.remove()
        os.mkfifo(self.path)  # to open it as a file would wait for ever


class Watched(File):
    def open(self, memory: UnnamedFile | None) -> ConfigStore:
        return WatchedFile(START, str(self.path), self.state / "shared.json", check, memory)

    def document(self, r: int) -> bytes:
        return f"models: {{tiny: {{r: {r}}}}}".encode()


class State(File):
    def open(self, memory: UnnamedFile | None) -> ConfigStore:
        return LocalConfig(START, self.path, check, memory)

    def document(self, r: int) -> bytes:
        return json.dumps({"version": next(self.versions), "models": {"tiny": {"r": r, "start": 0}}}).encode()


class InRedis:
    heals: ClassVar[frozenset[str]] = frozenset({"vanished"})  # it is written again
    longest: ClassVar[int] = 60_000  # what is longer fakeredis sends as redis-py cannot read it

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.versions = iter(range(5, 10**6))
        self.server = fakeredis.TcpFakeServer(("127.0.0.1", 0), server_type="redis")
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"redis://127.0.0.1:{self.server.server_address[1]}/0"
        self.client = redis.Redis.from_url(self.url)
        self.client.flushall()

    def close(self) -> None:
        self.client.close()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def open(self, memory: UnnamedFile | None) -> ConfigStore:
        return RedisConfig(START, self.url, self.state / "shared.json", check, memory)

    def document(self, r: int) -> bytes:
        return json.dumps({"version": next(self.versions), "models": {"tiny": r}}).encode()

    def put(self, content: bytes) -> None:
        self.client.delete(KEY)
        self.client.set(KEY, content)

    def remove(self) -> None:
        self.client.delete(KEY)

    def is_there(self) -> bool:
        return bool(self.client.exists(KEY))

    def other(self) -> None:
        self.client.delete(KEY)
        self.client.rpush(KEY, "a list")


SOURCES: list[type[Any]] = [Watched, State, InRedis]
KEEPERS = {Watched: WatchedFile, State: LocalConfig, InRedis: RedisConfig}

KINDS: dict[str, Callable[[Any], None]] = {
    "empty": lambda source: source.put(b""),
    "truncated": lambda source: source.put(source.document(NEXT)[:-3]),
    "binary": lambda source: source.put(bytes(range(256))),
    "NUL": lambda source: source.put(b"\0" * 100),
    "a typo": lambda source: source.put(source.document(NEXT).replace(b"models", b"model")),
    "wrong type": lambda source: source.put(b"[]"),
    "wrong type of r": lambda source: source.put(source.document(NEXT).replace(b": 3", b": true")),
    "out of range": lambda source: source.put(source.document(NEXT).replace(b": 3", b": 999")),
    "unknown": lambda source: source.put(b"models: &a {tiny: *a}"),
    "huge number": lambda source: source.put(source.document(NEXT).replace(b": 3", b": " + b"9" * 5000)),
    "deep": lambda source: source.put(b"[" * 50_000),
    "too long": lambda source: source.put(source.document(NEXT) + b" " * source.longest + b"x"),
    "vanished": lambda source: source.remove(),
    "not readable": lambda source: source.other(),
}


@pytest.fixture(params=SOURCES, ids=lambda each: each.__name__)
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    for module in (in_redis, watched):
        monkeypatch.setattr(module, "POLL_S", 0.01)
    monkeypatch.setattr(in_redis, "RETRY_S", 0.01)
    monkeypatch.setattr(in_redis, "TIMEOUT_S", 600)  # a Redis on a busy machine is slow; here it is never away
    made = request.param(tmp_path)
    if isinstance(made, InRedis):
        with closing(made):
            yield made
    else:
        yield made


@asynccontextmanager
async def followed(store: ConfigStore) -> Any:
    following = asyncio.create_task(store.follow())
    try:
        yield
        if not isinstance(store, LocalConfig):
            assert not following.done(), "it must not have ended by itself"
    finally:
        following.cancel()
        await asyncio.wait([following])


def stale() -> bool:
    return bool(REGISTRY.get_sample_value("tome_config_stale"))


def r_of(store: ConfigStore) -> RSetting:
    return store.configuration.models["tiny"]


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
async def test_the_last_good_configuration_goes_on(
    kind: str, moment: str, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    memory = UnnamedFile()
    source.put(source.document(GOOD))
    store = source.open(memory)
    async with followed(store):
        assert r_of(store) == GOOD and not stale() and not complaints(caplog)
        before = store.configuration
        if moment == MOMENTS[0]:
            KINDS[kind](source)
            await settled(store, source, kind, before, caplog)
    if moment != MOMENTS[0]:
        KINDS[kind](source)
        store = source.open(memory if moment == MOMENTS[1] else UnnamedFile())
        assert store.configuration == before
        async with followed(store):
            await settled(store, source, kind, before, caplog)


async def settled(
    store: ConfigStore, source: Source, kind: str, before: Configuration, caplog: pytest.LogCaptureFixture
) -> None:
    """What is spoilt is noticed, said once, and the next good document is taken."""
    if kind in source.heals:
        await until(source.is_there)
    else:
        await until(lambda: r_of(store) is not None and stale())
        await asyncio.sleep(0.05)  # several looks, none of which says it again
        assert len(complaints(caplog)) == 1
    assert store.configuration == before
    source.put(source.document(NEXT))
    await until(lambda: r_of(store) == NEXT and not stale())


def fail(*args: Any, **options: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.mkdir", "pathlib.Path.replace"])
async def test_where_nothing_can_be_written_it_goes_on_over_a_restart_of_the_engine(
    broken: str, source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, or a folder that may not be written."""
    memory = UnnamedFile()
    source.put(source.document(GOOD))
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        store = source.open(memory)
        before = store.configuration
        assert r_of(store) == GOOD and len(complaints(caplog)) == 1
    source.put(b"spoilt")
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        assert source.open(memory).configuration == before


async def test_a_change_sets_a_spoilt_state_file_aside(tmp_path: Path) -> None:
    source = State(tmp_path)
    source.put(source.document(GOOD))
    store = LocalConfig(START, source.path, check)
    before = store.configuration
    for kind in ("binary", "not readable", "vanished", "empty"):
        KINDS[kind](source)
        assert store.configuration == before and stale()
        before = await store.change({"tiny": 4})
        assert store.configuration == before and not stale()
        assert LocalConfig(START, source.path, check).configuration == before
    assert [source.path.with_suffix(f".{number}.refused").exists() for number in (1, 2, 3, 4)] == [True] * 3 + [False]


async def test_a_spoilt_state_file_of_which_nothing_was_kept_leaves_the_settings(tmp_path: Path) -> None:
    source = State(tmp_path)
    source.put(b"spoilt")
    store = LocalConfig(START, source.path, check)
    assert store.configuration == Configuration(1, START) and stale()
    assert (await store.change({"tiny": 4})).models["tiny"] == 4 and not stale()
    assert source.path.with_suffix(".1.refused").read_bytes() == b"spoilt"


async def test_what_was_kept_in_memory_is_that_of_the_engines_alone(tmp_path: Path) -> None:
    """Where no state is kept a change outlives the engine, and not the server."""
    memory = UnnamedFile()
    changed = await LocalConfig(START, None, check, memory).change({"tiny": 8})
    assert LocalConfig(START, None, check, memory).configuration == changed
    assert LocalConfig(START, None, check, UnnamedFile()).configuration == Configuration(1, START)


async def test_other_start_settings_win_over_what_was_kept_also_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.json"
    changed = await LocalConfig(START, file, check).change({"tiny": 8})
    monkeypatch.setattr("os.fsync", fail)
    for _ in range(2):
        restarted = LocalConfig(START | {"tiny": 5}, file, check)
        assert restarted.configuration == Configuration(changed.version + 1, START | {"tiny": 5})


def test_every_keeper_is_in_the_table() -> None:
    modules = [
        importlib.import_module(f"server.config.{module.name}")
        for module in pkgutil.iter_modules(server.config.__path__)
    ]
    keepers = {
        each
        for module in modules
        for _, each in inspect.getmembers(module, inspect.isclass)
        if hasattr(each, "follow") and hasattr(each, "change") and each is not ConfigStore
    }
    told = {PushedConfig}  # is told what it holds, and reads nothing: tests/ray
    assert keepers - told == set(KEEPERS.values()) and KEEPERS.keys() == set(SOURCES)
