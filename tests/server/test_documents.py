"""Documents of others that are no configuration: refused in one sentence, and whoever follows them goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server.config import watched
from server.config.local import LocalConfig
from server.config.pushed import PushedConfig
from server.config.stored import read_configuration
from server.config.watched import WatchedFile
from server.curve import Curve, CurveError
from server.dial import RSetting
from server.documents import read_yaml
from server.errors import InvalidError, SettingsError, shown
from server.ray_app import read_user_config
from server.settings_sources import load_settings
from server.types import Configuration, find_model
from tests.server.conftest import model_info, until

MODELS = {"tiny": model_info("tiny"), "large": model_info("large")}
START: dict[str, RSetting] = {"tiny": 0, "large": 2}
HEX = f"0x{'f' * 5000}"
"""An integer that YAML reads and Python does not write in decimal digits."""
BOMB = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Mappings that take the last one nine times each by `<<`: 43 million entries in 300 bytes."""
LAUGHS = "a: &a [lol]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
"""Lists that hold the last one nine times each: small as they are, a gigabyte when written out."""

BAD_R = [
    "2026-13-45",
    "0b_",
    "0x_",
    "1:_",
    "1" + "0" * 400,
    "1" + "0" * 5000,
    HEX,
    f"[1, {HEX}]",
    "2026-11-26",
    ".nan",
    ".inf",
    "1e999",
    "true",
    "null",
    "'[[[['",
    f"'{'[' * 100_000}'",
    "!!int ''",
    "!!int x",
    "!!float x",
    "!!bool x",
    "!!timestamp x",
    "!!binary x",
    "!!python/name:os.system x",
    "auto, max_r: " + HEX,
    "auto, max_r: true",
    "auto, min_agreement: .nan",
    "auto, min_agreement: true",
    "auto, min_agreement: " + HEX,
]
BAD_FILES = [
    *[f"models: {{tiny: {{r: {r}}}}}" for r in BAD_R],
    "models: &a {tiny: *a}",
    "models: &a {tiny: {r: &b [*b]}}",
    f"models: {{{HEX}: {{r: 1}}}}",
    f"models: {{tiny: {{r: 1, {HEX}: 1}}}}",
    "models: {2026-11-26: {r: 1}}",
    'models: {"\\ud800": {r: 1}}',
    "models: " + "[" * 50_000,
    "models: {? [a] : 1}",
    f"models: {{tiny: {{r: 1}}}}\n{BOMB}",
    f"{LAUGHS}models: {{tiny: *j}}",
    f"{LAUGHS}models: {{tiny: {{r: *j}}}}",
    f"{LAUGHS}models: *j",
    b"\xef\xbb",
    b"\x00",
    "models: {tiny: {r: 1}}\n---\nmodels: {}",
]
BAD_VERSIONS = ["1e999", "-1", "true", '"7"', "null", "[]", "{}", "1.5", "NaN", "1" + "0" * 400, "9" * 5000, str(2**53)]
BAD_DOCUMENTS = [
    *[f'{{"version": {version}, "models": {{}}}}' for version in BAD_VERSIONS],
    *[f'{{"version": 99, "models": {models}}}' for models in ("7", "null", "[]", '"tiny"', '[["tiny", 1]]')],
    *[
        f'{{"version": 99, "models": {{"tiny": {r}}}}}'
        for r in ("1e999", "NaN", "null", "true", "[[1]]", "9" * 5000, "[" * 100_000, '{"max_r": 1e999}', '"' + "[" * 9)
    ],
    '{"version": 99, "models": {"tiny": {"min_agreement": NaN}}}',
    '{"version": 99}',
    "[" * 100_000,
    '{"a":' * 100_000,
    '"',
    "\x00",
    "NaN",
]


def check(models: Mapping[str, RSetting]) -> None:
    for name, r in models.items():
        find_model(MODELS, name).check(r)


def encoded(document: str | bytes) -> bytes:
    return document if isinstance(document, bytes) else document.encode()


def one_sentence(error: Exception) -> bool:
    return 0 < len(str(error)) < 700 and "\n" not in str(error)


@asynccontextmanager
async def followed(store: Any) -> AsyncIterator[None]:
    """The store follows its source, and has not ended by itself at the end."""
    following = asyncio.create_task(store.follow())
    try:
        yield
        assert not following.done()
    finally:
        following.cancel()
        await asyncio.wait([following])


class TestKnownBad:
    @pytest.mark.parametrize("text", BAD_FILES, ids=lambda text: str(text)[:40])
    async def test_a_watched_file_goes_on_after_it(self, text: str | bytes, tmp_path: Path) -> None:
        file = tmp_path / "config.yaml"
        file.write_text("models: {tiny: {r: 8}}")
        store = WatchedFile(START, str(file), tmp_path / "cache.json", check)
        async with followed(store):
            before = store.configuration
            file.write_bytes(encoded(text))
            with pytest.raises(SettingsError) as refusal:
                WatchedFile(START, str(file), None, check)
            assert one_sentence(refusal.value)
            await until(lambda: store._refusal is not None)
            assert store.configuration == before
            file.write_text("models: {tiny: {r: 3}}")
            await until(lambda: store.configuration.models["tiny"] == 3)

    @pytest.mark.parametrize("r", [r for r in BAD_R if "auto" not in r], ids=lambda r: r[:30])
    def test_the_same_r_in_the_settings_ends_the_start_in_one_line(self, r: str, tmp_path: Path) -> None:
        file = tmp_path / "settings.yaml"
        file.write_text(f"r: {r}")
        with pytest.raises(SettingsError) as refusal:
            model = load_settings({}, str(file)).model[0]  # r alone is no model's: as high as it likes
            raise SettingsError(f"not {model.name}")
        assert one_sentence(refusal.value)

    @pytest.mark.parametrize(
        "text",
        [
            f"port: {HEX}",
            f"threads: {HEX}",
            "threads: 1" + "0" * 400,
            "batch_timeout_s: .inf",
            "deadline_s: .nan",
            "port: 2026-13-45",
            f"{HEX}: 1",
            BOMB,
            f"{LAUGHS}port: *j",
            "[]",
            "0",
            "port: &a [*a]",
        ],
        ids=lambda text: text[:30],
    )
    def test_settings_end_the_start_in_one_line(self, text: str, tmp_path: Path) -> None:
        file = tmp_path / "settings.yaml"
        file.write_text(text)
        with pytest.raises(SettingsError) as refusal:
            load_settings({}, str(file))
        assert all(one_sentence(Exception(line)) for line in str(refusal.value).splitlines())

    @pytest.mark.parametrize("text", BAD_DOCUMENTS, ids=lambda text: text[:60])
    def test_a_state_file_a_cache_and_a_document_of_redis_are_refused(self, text: str, tmp_path: Path) -> None:
        with pytest.raises(InvalidError) as refusal:
            check(read_configuration(text).models)
        assert one_sentence(refusal.value)
        file, config = tmp_path / "state.json", tmp_path / "config.yaml"
        file.write_text(text)
        assert LocalConfig(START, file, check).configuration == Configuration(1, START)
        config.write_text("models: {}")
        assert WatchedFile(START, str(config), file, check).configuration == Configuration(1, START)

    async def test_a_state_file_that_no_model_can_merge_by_changes_nothing(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        file = tmp_path / "state.json"
        store = LocalConfig(START, file, check)
        before = await store.change({"tiny": 3})
        file.write_text('{"version": 9, "models": {"tiny": {"r": 99, "start": 0}}}')
        assert store.configuration == before == store.configuration
        assert len(caplog.records) == 1 and "between 0 and 8" in caplog.text

    @pytest.mark.parametrize("text", ["", "[" * 100_000, "9" * 5000, '{"rows": NaN}', "\x00", '{"model": "\\ud800"}'])
    def test_a_curve_is_refused(self, text: str) -> None:
        with pytest.raises(CurveError, match="^it is no curve: "):
            Curve.from_json(text)

    @pytest.mark.parametrize(
        "said", [{int(HEX, 16): 1}, {"r": int(HEX, 16)}, {"r": "auto", "max_r": int(HEX, 16)}, {"models": {1: 2}}]
    )
    def test_what_ray_tells_is_refused(self, said: Any) -> None:
        with pytest.raises(InvalidError) as refusal:
            read_user_config(said, MODELS)
        assert one_sentence(refusal.value)


def test_what_is_quoted_is_never_long() -> None:
    nested: Any = ["x" * 1000] * 1000
    for _ in range(10):
        nested = [nested] * 9
    assert len(shown(nested)) < 300 and len(shown({"key": nested, 1: int(HEX, 16)})) < 300


def test_mappings_that_take_others_are_read() -> None:
    text = "a: &a {r: 8}\nb: {<<: *a, max_r: 1}\nc: {<<: [*a, *a]}"
    assert read_yaml(text) == {"a": {"r": 8}, "b": {"r": 8, "max_r": 1}, "c": {"r": 8}}


class TestUnforeseen:
    """Whatever is raised by taking a document over, the next one is taken."""

    @staticmethod
    def failing() -> tuple[Callable[[Mapping[str, RSetting]], None], list[object]]:
        """A check that fails as no check should for r=7, and its calls."""
        calls: list[object] = []

        def fail(models: Mapping[str, RSetting]) -> None:
            calls.append(models)
            if models.get("tiny") == 7:
                raise MemoryError("as a check that has a fault")

        return fail, calls

    async def test_a_watched_file(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        file = tmp_path / "config.yaml"
        file.write_text("models: {tiny: {r: 1}}")
        fail, calls = self.failing()
        store = WatchedFile(START, str(file), None, fail)
        async with followed(store):
            for text in ("models: {tiny: {r: 7}}", "models: {tiny: {r: 7}, large: {r: 1}}"):
                seen = len(calls)
                file.write_text(text)
                await until(lambda seen=seen: len(calls) > seen)  # type: ignore[misc]
            file.write_text("models: {tiny: {r: 3}}")
            await until(lambda: store.configuration.models["tiny"] == 3)
        told = [record for record in caplog.records if record.levelname == "ERROR"]
        assert len(told) == 1 and told[0].exc_info is not None  # once, with the traceback

    async def test_a_path_that_cannot_be_read_for_whatever_reason(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "config.yaml"
        file.write_text("models: {tiny: {r: 1}}")
        store = WatchedFile(START, str(file), None, check)
        with monkeypatch.context() as patch:
            patch.setattr(watched, "read_file", lambda path: bytes(10**20))
            async with followed(store):
                await until(lambda: store._problem is not None)
                patch.undo()
                file.write_text("models: {tiny: {r: 3}}")
                await until(lambda: store.configuration.models["tiny"] == 3)

    def test_what_is_pushed_is_refused_whatever_it_raised(self, caplog: pytest.LogCaptureFixture) -> None:
        store = PushedConfig(START, "somebody", None, check)
        for error in (InvalidError("r is odd"), InvalidError("r is odd"), OverflowError("too large")):
            store.refuse(error)
        assert [record.message for record in caplog.records] == [
            "the configuration of somebody is refused: r is odd; configuration 1 stays in force",
            "the configuration of somebody is refused: OverflowError('too large'); configuration 1 stays in force",
        ]
