"""Which models came and went: kept over a restart of engine and server, as long as the start says the same."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from server.config.model_set import ModelSet
from server.settings import Settings
from server.settings_sources import load_settings
from server.unnamed import UnnamedFile

NOTHING: dict[str, str | None] = {}


def settings(state: Path | None, *models: str) -> Settings:
    said: dict[str, Any] = {"state_dir": "none" if state is None else str(state)}
    return load_settings(said | ({"model": list(models)} if models else {}))


def test_what_came_and_went_outlives_the_server(tmp_path: Path) -> None:
    start = settings(tmp_path, "bundled,name=tiny", "vit_tiny_patch16_224,name=large")
    models = ModelSet(start, UnnamedFile())
    assert models.entries() == NOTHING
    models.keep("cats", "2")
    models.keep("tiny", None)
    models.keep("large", "1")
    assert ModelSet(start, UnnamedFile()).entries() == {"cats": "2", "tiny": None, "large": "1"}
    models.keep("tiny", "1")
    assert ModelSet(start).entries() == {"cats": "2", "tiny": "1", "large": "1"}
    assert (tmp_path / "models-8000.json").exists()


def test_without_a_state_folder_it_outlives_an_engine(tmp_path: Path) -> None:
    memory, start = UnnamedFile(), settings(None)
    ModelSet(start, memory).keep("cats", "2")
    assert ModelSet(start, memory).entries() == {"cats": "2"}
    assert ModelSet(start, UnnamedFile()).entries() == NOTHING
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other", ["local-dir:b,name=m", "local-dir:a,name=m,version=3", "local-dir:a,weights=w,name=m"]
)
def test_who_starts_a_name_with_another_model_means_that_one(tmp_path: Path, other: str) -> None:
    models = ModelSet(settings(tmp_path, "local-dir:a,name=m"))
    models.keep("m", None)
    models.keep("cats", "1")
    assert ModelSet(settings(tmp_path, other)).entries() == {"cats": "1"}
    assert ModelSet(settings(tmp_path, "local-dir:a,name=m,r=3")).entries() == {"cats": "1", "m": None}
    assert ModelSet(settings(tmp_path, "local-dir:a,name=m", "bundled,name=cats")).entries() == {"m": None}


def test_servers_of_different_ports_keep_their_own(tmp_path: Path) -> None:
    ModelSet(load_settings({"state_dir": str(tmp_path), "port": 1})).keep("cats", "1")
    assert ModelSet(load_settings({"state_dir": str(tmp_path), "port": 2})).entries() == NOTHING


@pytest.mark.parametrize(
    "content",
    ["", "no JSON", "[]", '{"models": 3}', '{"models": {"cats": 1}}', '{"models": {"cats": {"version": 2}}}'],
)
def test_a_spoilt_file_is_not_used_and_stops_nothing(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "models-8000.json"
    file.write_text(content)
    models = ModelSet(settings(tmp_path))
    assert models.entries() == NOTHING
    assert f"which models were loaded, as {file} keeps it, is not used" in caplog.text
    models.keep("cats", "1")
    assert json.loads(file.read_text()) == {"models": {"cats": {"version": "1", "start": None}}}


def test_a_file_that_cannot_be_written_is_told_and_memory_keeps_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("no folder")
    memory, start = UnnamedFile(), settings(tmp_path / "state")
    with caplog.at_level(logging.WARNING):
        ModelSet(start, memory).keep("cats", "1")
    assert "which models were loaded cannot be kept in" in caplog.text
    assert ModelSet(start, memory).entries() == {"cats": "1"}


def keep_many(start: Settings, memory: UnnamedFile, prefix: str) -> None:
    models = ModelSet(start, memory)
    for number in range(20):
        models.keep(f"{prefix}{number}", str(number + 1))


def test_engines_that_change_it_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    memory, start = UnnamedFile(), settings(None)
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=keep_many, args=(start, memory, prefix)) for prefix in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(ModelSet(start, memory).entries()) == 40
