"""Keys as settings: where they come from, what stops the start, and that no message shows one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.cli import main
from server.config.store import open_store
from server.documents import read_yaml
from server.errors import InvalidError, SettingsError
from server.keys import KEYS
from server.settings import Settings
from server.settings_sources import load_settings

HUSH = "hush-0123456789"


def refusal(flags: dict[str, object], config: str | None = None) -> str:
    """The sentence that ends the start; it never shows the key."""
    with pytest.raises(SettingsError) as error:
        load_settings(flags, config)
    message = str(error.value)
    assert "hush" not in message and "\n" not in message
    return message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "key"


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_key_comes_from_a_file(key: str, end: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_bytes((HUSH + end).encode())
    assert getattr(load_settings({f"{key}_file": str(file)}), key) == HUSH
    monkeypatch.setenv(f"TOME_{key.upper()}_FILE", str(file))
    assert getattr(load_settings({}), key) == HUSH


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "No such file"),
        (b"", "empty"),
        (b"\n", "empty"),
        (b"  \n", "ASCII"),
        (b"hush-1\nhush-2\n", "ASCII"),
        (b"hush 1", "ASCII"),
        ("hush-schlüssel".encode(), "ASCII"),
        (b"\xff\xfeh\0u\0s\0h\0", "not a text file"),
        (b"\xef\xbb\xbfhush", "ASCII"),
        (b"hush" * 10_000, "ASCII"),
    ],
)
def test_a_file_without_a_key_stops_the_start(key: str, content: bytes | None, named: str, file: Path) -> None:
    if content is not None:
        file.write_bytes(content)
    message = refusal({f"{key}_file": str(file)})
    assert message.startswith(f"{key}_file: ") and str(file) in message and named in message


def test_what_is_no_file_stops_the_start(tmp_path: Path) -> None:
    assert "Is a directory" in refusal({"api_key_file": str(tmp_path)})
    assert "not a text file" in refusal({"api_key_file": "a\0b"})
    assert "No such file" in refusal({"api_key_file": "/no/\udcff"})  # a name that is no UTF-8, as the system gives it


def test_a_key_that_is_wrong_in_a_file_whose_name_is_no_utf_8_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / "key-\udcff"
    file.write_text("two words")
    assert "visible ASCII" in refusal({"api_key_file": str(file)})


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_stops_the_start(file: Path) -> None:
    file.touch(mode=0o000)
    assert "Permission denied" in refusal({"api_key_file": str(file)})


@pytest.mark.parametrize("key", KEYS)
def test_a_key_given_both_ways_stops_the_start(key: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(HUSH)
    monkeypatch.setenv(f"TOME_{key.upper()}", HUSH)
    assert refusal({f"{key}_file": str(file)}) == f"{key} and {key}_file are both given; give one of them"


@pytest.mark.parametrize("name", [*KEYS, *(f"{key}_file" for key in KEYS)])
def test_an_empty_key_stops_the_start(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "empty" in refusal({name: ""})
    config = tmp_path / "settings.yaml"
    for text in (f"{name}:", f"{name}: ''", f"{name}: ~"):
        config.write_text(text)
        assert "empty" in refusal({}, str(config))
    monkeypatch.setenv(f"TOME_{name.upper()}", "")
    assert name in refusal({}) and "empty" in refusal({})


BAD_KEYS = ["   ", "hush hush", "hush\n", "hush\t", "hüsh-hush", "hush\0", "hush" * 2000]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [*BAD_KEYS, 20261125777, ["hush", "x"], {"hush": 1}, True], ids=ascii)
def test_a_key_that_no_header_can_carry_stops_the_start_and_is_not_shown(key: str, value: object) -> None:
    message = refusal({key: value})
    assert message.startswith(f"{key}: it ") and "20261125777" not in message


@pytest.mark.parametrize(
    "text",
    [
        'api_key: "hush: x',
        "api_key: *hush",
        "api_key: !hush",
        "api_key: !!int hush",
        "api_key: !!bool hush",
        'api_key: "hush\\q"',
        "api_key: hush: hush",
        "api_key: 'hush' hush",
        "port: 1\napi_key:hush",
        "{api_key:hush}",
        "{api_key hush: 1}",
        "api_key: [hush]",
        "admin-key: {hush: hush}",
        "shared_config: ['redis://:hush@host']",
    ],
)
def test_a_settings_file_that_is_wrong_is_not_quoted(text: str, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text(text)
    refusal({}, str(config))


def test_where_a_document_is_wrong_is_told() -> None:
    with pytest.raises(InvalidError, match=r"could not find expected ':', line 2, column 2$"):
        read_yaml("a: 1\nb")
    with pytest.raises(InvalidError, match=r"character '\\t' that cannot start any token, line 1, column 1$"):
        read_yaml("\ta: 1")


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hush@127.0.0.1:port/0",
        "redis://:hush/hush@127.0.0.1",
        "redis://:1/hush@127.0.0.1",
        "redis://user:12?hush@127.0.0.1",
        "redis://user:12#hush@127.0.0.1",
        "redis://:hu[sh@127.0.0.1",
        "redis://:hush@127.0.0.1?db=hush",
        "redis://:hush@127.0.0.1/hush",
        "rediss3://:hush@127.0.0.1",
        "redis:/:hush@127.0.0.1",
        "http://:hush@127.0.0.1",
    ],
)
def test_a_wrong_url_of_redis_does_not_show_its_password(url: str) -> None:
    pytest.importorskip("redis")
    settings = load_settings({"shared_config": url, "state_dir": "none"})
    with pytest.raises(SettingsError, match="must have the form redis") as error:
        open_store(settings, lambda models: None)
    assert "hu" not in str(error.value) and "12" not in str(error.value)


def test_settings_that_are_shown_hide_their_secrets(file: Path) -> None:
    file.write_text("hush-3")
    said = {"api_key": "hush-1", "admin_key": "hush-2", "metrics_key_file": str(file)}
    settings = Settings.model_validate(said | {"shared_config": "redis://:hush-4@host"})
    assert settings.metrics_key == "hush-3"
    assert "hush" not in repr(settings) and "hush" not in str(settings)


def test_a_key_on_the_command_line_is_warned_of_and_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, file: Path
) -> None:
    monkeypatch.setattr("server.supervisor.serve", lambda settings: 0)
    monkeypatch.setattr("server.lifetime.configure_logging", lambda *args: None)
    file.write_text(HUSH)
    with caplog.at_level(logging.WARNING):
        assert main(["serve", "--admin-key-file", str(file)]) == 0
        assert not caplog.messages
        assert main(["serve", "--api-key", HUSH]) == 0
    (warning,) = caplog.messages
    assert "--api-key-file or TOME_API_KEY" in warning and HUSH not in warning


def test_the_command_says_in_one_sentence_why_it_does_not_start() -> None:
    environment = {**os.environ, "TOME_API_KEY": ""}
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "serve"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("tome-server: api_key: it is empty") and done.stderr.count("\n") == 1
