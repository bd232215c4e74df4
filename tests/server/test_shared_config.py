"""A configuration that servers share: a file that somebody else writes, and Redis."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from prometheus_client import REGISTRY

from server.config.in_redis import KEY, RedisConfig, _document
from server.config.local import LocalConfig
from server.config.store import ConfigStore, open_store
from server.config.watched import WatchedFile
from server.dial import AutoR, RSetting
from server.errors import ConflictError, InvalidError, SettingsError, UnavailableError
from server.settings import Settings
from server.types import Configuration, find_model
from tests.server.conftest import model_info, until
from tests.server.test_any_document import json_documents

fakeredis = pytest.importorskip("fakeredis", reason="Redis is played by fakeredis: pip install fakeredis")
redis = pytest.importorskip("redis", reason="the shared configuration in Redis needs it: pip install redis")

MODELS = {"tiny": model_info("tiny"), "large": model_info("large")}
START: dict[str, RSetting] = {"tiny": 0, "large": (4, 2, 0)}


def check(models: Mapping[str, RSetting]) -> None:
    for name, r in models.items():
        find_model(MODELS, name).check(r)


@asynccontextmanager
async def followed(store: ConfigStore) -> AsyncIterator[ConfigStore]:
    """The store while it follows its source."""
    following = asyncio.create_task(store.follow())
    try:
        yield store
    finally:
        following.cancel()
        await asyncio.wait([following])
        assert following.cancelled(), "it must not have ended by itself"


def source_up() -> float | None:
    return REGISTRY.get_sample_value("tome_config_source_up")


class TestFile:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        file = tmp_path / "config.yaml"
        file.write_text("models: {tiny: {r: 8}}")
        return file

    def test_it_holds_over_the_start_setting_and_leaves_what_it_does_not_name(self, file: Path) -> None:
        assert WatchedFile(START, str(file), None, check).configuration.models == START | {"tiny": 8}

    @pytest.mark.parametrize(
        ("text", "r"),
        [
            ("models: {tiny: {r: [4, 2, 0]}}", (4, 2, 0)),
            ("models: {tiny: {r: '4,2'}}", (4, 2)),
            ("models: {tiny: {r: auto, max_r: 6}}", AutoR(max_r=6)),
            ('{"models": {"tiny": {"r": "auto", "min_agreement": 0.9}}}', AutoR(min_agreement=0.9)),
            ("models: {}", 0),
        ],
    )
    async def test_a_change_of_the_file_is_taken_over(self, text: str, r: RSetting, file: Path) -> None:
        async with followed(WatchedFile(START, str(file), None, check)) as store:
            before = store.configuration.version
            file.write_text(text)
            await until(lambda: store.configuration.version > before)
            assert store.configuration == Configuration(before + 1, START | {"tiny": r})

    async def test_the_swap_of_a_symbolic_link_is_seen(self, tmp_path: Path) -> None:
        """As the kubelet updates a ConfigMap: the files lie in a folder that a link names, and the link is replaced."""
        for name, r in (("old", 1), ("new", 2)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.yaml").write_text(f"models: {{tiny: {{r: {r}}}}}")
        (tmp_path / "..data").symlink_to("old")
        (tmp_path / "config.yaml").symlink_to("..data/config.yaml")
        async with followed(WatchedFile(START, str(tmp_path / "config.yaml"), None, check)) as store:
            assert store.configuration.models["tiny"] == 1
            (tmp_path / "..data_tmp").symlink_to("new")
            (tmp_path / "..data_tmp").replace(tmp_path / "..data")
            await until(lambda: store.configuration.models["tiny"] == 2)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "models",
            "models: [",
            "models: {tiny: 8}",
            "models: {tiny: {q: 8}}",
            "models: {tiny: {r: 8, max_r: 8}}",
            "models: {tiny: {r: 99}}",
            "models: {huge: {r: 1}}",
            "models: {}\nversion: 3",
            b"\xff\xfe\x00",
        ],
    )
    async def test_a_wrong_file_changes_nothing_and_ends_a_start(self, text: str | bytes, file: Path) -> None:
        async with followed(WatchedFile(START, str(file), None, check)) as store:
            before = store.configuration
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
            with pytest.raises(SettingsError, match=r"config\.yaml"):
                WatchedFile(START, str(file), None, check)
            file_is_read = asyncio.create_task(until(lambda: store._refusal is not None))  # type: ignore[attr-defined]
            await file_is_read
            assert store.configuration == before
            file.write_text("models: {tiny: {r: 3}}")
            await until(lambda: store.configuration.models["tiny"] == 3)

    async def test_a_file_that_is_gone_is_told_and_waited_for(self, file: Path) -> None:
        async with followed(WatchedFile(START, str(file), None, check)) as store:
            before = store.configuration
            file.unlink()
            await until(lambda: source_up() == 0)
            assert store.configuration == before
            file.write_text("models: {tiny: {r: 3}}")
            await until(lambda: store.configuration.models["tiny"] == 3 and source_up() == 1)

    def test_without_the_file_there_is_no_start(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="No such file"):
            WatchedFile(START, str(tmp_path / "none.yaml"), None, check)

    async def test_it_is_changed_where_it_lies_and_not_here(self, file: Path) -> None:
        with pytest.raises(ConflictError, match=r"config\.yaml"):
            await WatchedFile(START, str(file), None, check).change({"tiny": 1})

    def test_versions_go_on_over_a_restart(self, file: Path, tmp_path: Path) -> None:
        cache = tmp_path / "state" / "shared.json"
        first = WatchedFile(START, str(file), cache, check).configuration
        assert WatchedFile(START, str(file), cache, check).configuration == first
        file.write_text("models: {tiny: {r: 3}}")
        assert WatchedFile(START, str(file), cache, check).configuration.version == first.version + 1


@pytest.fixture
def url() -> Iterator[str]:
    """A Redis of this process, reached over a socket."""
    server = fakeredis.TcpFakeServer(("127.0.0.1", 0), server_type="redis")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"redis://127.0.0.1:{server.server_address[1]}/0"
    with redis.Redis.from_url(url) as client:
        client.flushall()  # fakeredis may know the address from an earlier test
    yield url
    server.shutdown()
    server.server_close()
    thread.join()


class TestRedis:
    async def test_a_change_through_one_server_reaches_the_others_with_its_version(self, url: str) -> None:
        one, two = (RedisConfig(START, url, None, check) for _ in range(2))
        async with followed(one), followed(two):
            changed = await one.change({"tiny": 8, "large": AutoR(max_r=3)})
            assert changed == one.configuration == Configuration(2, {"tiny": 8, "large": AutoR(max_r=3)})
            await until(lambda: two.configuration == changed)
            back = await two.change({"tiny": 1}, 2)
            await until(lambda: one.configuration == back)
            assert back.version == 3

    async def test_a_server_that_starts_late_reads_the_current_one(self, url: str) -> None:
        async with followed(RedisConfig(START, url, None, check)) as early:
            await early.change({"tiny": 8})
        late = RedisConfig({"tiny": 5}, url, None, check)
        assert late.configuration == Configuration(2, {"tiny": 8})

    async def test_changes_at_once_are_all_kept_and_only_one_of_the_same_version_wins(self, url: str) -> None:
        stores = [RedisConfig(START, url, None, check) for _ in range(4)]
        async with contextlib.AsyncExitStack() as stack:
            for store in stores:
                await stack.enter_async_context(followed(store))
            names = ["tiny", "large", "tiny", "large"]
            changes = [store.change({name: 1}) for store, name in zip(stores, names, strict=True)]
            assert sorted([each.version for each in await asyncio.gather(*changes)])[-1] == 5
            await until(lambda: all(s.configuration == Configuration(5, {"tiny": 1, "large": 1}) for s in stores))
            guarded = [store.change({"tiny": 2}, 5) for store in stores]
            results = await asyncio.gather(*guarded, return_exceptions=True)
            assert sum(isinstance(result, ConflictError) for result in results) == 3

    async def test_an_r_that_a_model_here_cannot_merge_is_refused_and_never_written(self, url: str) -> None:
        async with followed(RedisConfig(START, url, None, check)) as store:
            with pytest.raises(InvalidError, match="between 0 and 8"):
                await store.change({"tiny": 99})
            assert store.configuration == Configuration(1, START)
            with redis.Redis.from_url(url) as client:
                assert client.get(KEY) is None

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            '{"version": 9}',
            '{"version": 9, "models": {"tiny": 99}}',
            '{"version": 1e999, "models": {}}',
            '{"version": true, "models": {}}',
            '{"version": 9, "models": [["tiny", 1]]}',
            '{"version": 9, "models": {"tiny": {"max_r": 1e999}}}',
            f'{{"version": {10**400}, "models": {{}}}}',
            "[" * 100_000,
        ],
        ids=lambda text: text[:50],
    )
    async def test_what_no_server_has_written_changes_nothing(self, text: str, url: str) -> None:
        async with followed(RedisConfig(START, url, None, check)) as store:
            await store.change({"tiny": 8})
            before = store.configuration
            with redis.Redis.from_url(url) as client:
                client.set(KEY, text)
                client.publish(KEY, "changed")
                await until(lambda: store._refusal is not None)  # type: ignore[attr-defined]
                assert store.configuration == before
                assert client.get(KEY) == text.encode()
                client.set(KEY, '{"version": 7, "models": {"tiny": 4}}')
                client.publish(KEY, "changed")
                await until(lambda: store.configuration == Configuration(7, START | {"tiny": 4}))

    @given(json_documents)
    def test_any_document_is_read_or_refused(self, content: bytes) -> None:
        with contextlib.suppress(InvalidError):
            assert _document(content).version >= 0

    async def test_whatever_taking_one_over_raises_the_next_one_is_taken(
        self, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        calls = []

        def fail(models: Mapping[str, RSetting]) -> None:
            calls.append(models)
            if models.get("tiny") == 7:
                raise MemoryError("as a check that has a fault")

        store = RedisConfig(START, url, None, fail)
        with redis.Redis.from_url(url) as client:
            async with followed(store):
                client.set(KEY, '{"version": 5, "models": {"tiny": 7}}')
                client.publish(KEY, "changed")
                await until(lambda: len(calls) > 1)  # it was looked at again
                client.set(KEY, '{"version": 6, "models": {"tiny": 3}}')
                await until(lambda: store.configuration == Configuration(6, START | {"tiny": 3}))
        assert caplog.text.count("is refused: MemoryError(") == 1

    @pytest.mark.parametrize("text", ["{", '{"version": 9, "models": {"large": 99}}'])
    async def test_a_change_upon_what_is_refused_is_not_the_fault_of_who_asks(self, text: str, url: str) -> None:
        async with followed(RedisConfig(START, url, None, check)) as store:
            before = await store.change({"tiny": 8})
            with redis.Redis.from_url(url) as client:
                client.set(KEY, text)
                with pytest.raises(UnavailableError, match="Redis at .* is refused"):
                    await store.change({"tiny": 1})
                assert client.get(KEY) == text.encode() and store.configuration == before
                client.delete(KEY)
            assert (await store.change({"tiny": 1})).version == before.version + 1

    async def test_models_of_other_servers_are_left_as_they_are(self, url: str) -> None:
        other = RedisConfig({"huge": 1}, url, None, lambda models: None)
        async with followed(other), followed(RedisConfig(START, url, None, check)) as store:
            await other.change({"huge": 99})
            await until(lambda: store.configuration.version == 2)
            await store.change({"tiny": 3})
            await until(lambda: other.configuration == Configuration(3, {"huge": 99}))
            assert store.configuration == Configuration(3, START | {"tiny": 3})

    def test_a_url_that_is_none_ends_the_start(self) -> None:
        with pytest.raises(SettingsError, match="shared configuration"):
            RedisConfig(START, "http://localhost", None, check)


class RedisServer:
    """A real one, on a port that it keeps, without a disk: it forgets everything when it ends."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._process = None


@pytest.fixture
def server() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.stop()


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no redis-server here to stop and start")
class TestRedisComesAndGoes:
    async def test_while_it_is_away_the_last_one_goes_on_and_changes_are_refused(self, server: RedisServer) -> None:
        one, two = (RedisConfig(START, server.url, None, check) for _ in range(2))
        async with followed(one), followed(two):
            await until(lambda: source_up() == 1)
            changed = await _changed(one, {"tiny": 8})
            await until(lambda: two.configuration == changed)
            server.stop()
            await until(lambda: source_up() == 0)
            with pytest.raises(UnavailableError, match="does not answer"):
                await one.change({"tiny": 1})
            assert one.configuration == two.configuration == changed
            server.start()  # without its data, which it gets from us
            await until(lambda: source_up() == 1)
            assert (await _changed(two, {"large": 1})).version == changed.version + 1
            await until(lambda: one.configuration == Configuration(changed.version + 1, {"tiny": 8, "large": 1}))

    async def test_a_start_without_it_takes_what_was_kept(self, server: RedisServer, tmp_path: Path) -> None:
        cache = tmp_path / "state" / "shared.json"
        async with followed(RedisConfig(START, server.url, cache, check)) as store:
            changed = await _changed(store, {"tiny": 8})
        server.stop()
        async with followed(RedisConfig(START, server.url, cache, check)) as store:
            assert store.configuration == changed
            server.start()
            late = RedisConfig(START, server.url, None, check)
            async with followed(late):
                await until(lambda: late.configuration == changed)


async def _changed(store: ConfigStore, changes: dict[str, RSetting]) -> Configuration:
    """The change, once the server that was just started answers."""
    while True:
        try:
            return await store.change(changes)
        except UnavailableError:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("content", ["", "[]", '{"version": 3}', '{"version": 3, "models": {"tiny": 99}}'])
def test_a_kept_configuration_that_is_no_longer_good_is_not_used(content: str, tmp_path: Path) -> None:
    cache, file = tmp_path / "shared.json", tmp_path / "config.yaml"
    cache.write_text(content)
    file.write_text("models: {}")
    assert WatchedFile(START, str(file), cache, check).configuration == Configuration(1, START)


def test_the_setting_says_which_keeper(tmp_path: Path, url: str) -> None:
    (tmp_path / "config.yaml").write_text("models: {}")

    def opened(**settings: Any) -> ConfigStore:
        return open_store(Settings.model_validate({"state_dir": tmp_path / "state"} | settings), lambda models: None)

    assert isinstance(opened(), LocalConfig)
    assert isinstance(opened(shared_config=str(tmp_path / "config.yaml")), WatchedFile)
    assert isinstance(opened(shared_config=url), RedisConfig)
    assert json.loads(json.dumps(opened(r=4).configuration.to_json()))["models"].popitem()[1] == 4
