"""The live configuration: versions, restarts, conflicts, and files that cannot be read or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.config_store import ConfigStore
from server.dial import RSetting
from server.errors import ConflictError, EngineError
from server.settings import SettingsError
from server.types import Deployment

START: dict[str, RSetting] = {"tiny": 0, "large": (4, 2)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "config.json"


def test_the_start_setting_is_in_force_until_a_change(file: Path) -> None:
    store = ConfigStore(START, file)
    assert store.deployment("tiny") == Deployment(0, store.version)
    assert store.deployment("large") == Deployment((4, 2), store.version)
    assert not file.exists()


@pytest.mark.parametrize("r", [8, 0, (8, 4, 2)])
def test_a_change_raises_the_version_by_one_and_leaves_other_models_alone(r: RSetting, file: Path) -> None:
    store = ConfigStore(START, file)
    version = store.version
    assert store.set_r("tiny", r) == store.deployment("tiny") == Deployment(r, version + 1)
    assert store.deployment("large").r == (4, 2)


@pytest.mark.parametrize("r", [8, (8, 4, 2)])
def test_a_change_survives_a_restart_with_its_version(r: RSetting, file: Path) -> None:
    ConfigStore(START, file).set_r("tiny", 3)
    changed = ConfigStore(START, file).set_r("tiny", r)
    assert ConfigStore(START, file).deployment("tiny") == changed
    assert ConfigStore(START, file).deployment("large").r == (4, 2)


def test_without_a_file_a_change_lives_in_memory() -> None:
    store = ConfigStore(START)
    store.set_r("tiny", 8)
    assert store.deployment("tiny").r == 8
    assert ConfigStore(START).deployment("tiny").r == 0


def test_a_changed_start_setting_wins_over_the_earlier_live_change(file: Path) -> None:
    changed = ConfigStore(START, file).set_r("tiny", 8)
    restarted = ConfigStore(START | {"tiny": 5}, file)
    assert restarted.deployment("tiny").r == 5
    assert restarted.version > changed.config_version  # the configuration did change: an old ETag must not fit


def test_a_changed_start_setting_of_one_model_leaves_the_live_change_of_another(file: Path) -> None:
    store = ConfigStore(START, file)
    store.set_r("tiny", 8)
    store.set_r("large", 1)
    restarted = ConfigStore(START | {"tiny": 5}, file)
    assert (restarted.deployment("tiny").r, restarted.deployment("large").r) == (5, 1)


def test_a_model_that_is_no_longer_served_is_forgotten(file: Path) -> None:
    ConfigStore(START, file).set_r("tiny", 8)
    assert ConfigStore({"large": 2}, file).deployment("large").r == 2


def test_a_stale_version_is_a_conflict_and_changes_nothing(file: Path) -> None:
    store = ConfigStore(START, file)
    first = store.version
    store.set_r("tiny", 8, expected_version=first)
    with pytest.raises(ConflictError) as conflict:
        store.set_r("tiny", 9, expected_version=first)
    assert conflict.value.details == {"config_version": first + 1}
    assert store.deployment("tiny") == ConfigStore(START, file).deployment("tiny") == Deployment(8, first + 1)


def test_each_write_leaves_one_whole_file(file: Path) -> None:
    store = ConfigStore(START, file)
    for r in range(5):
        store.set_r("tiny", r)
        assert json.loads(file.read_text())["models"]["tiny"]["r"] == r
        assert list(file.parent.iterdir()) == [file]


def test_a_write_that_a_crash_cut_short_leaves_the_old_value(file: Path) -> None:
    ConfigStore(START, file).set_r("tiny", 8)
    file.with_suffix(".new").write_text('{"version": 9, "mod')
    store = ConfigStore(START, file)
    assert store.deployment("tiny").r == 8
    store.set_r("tiny", 4)
    assert ConfigStore(START, file).deployment("tiny").r == 4


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b"{}",
        b'{"version": 2}',
        b'{"version": 2, "models": []}',
        b'{"version": 2, "models": {"tiny": 8}}',
        b'{"version": 2, "models": {"tiny": {"r": 8}}}',
        b'{"version": 2, "models": {"tiny": {"r": -8, "start": 0}}}',
        b'{"version": "x", "models": {}}',
        b'{"version": null, "models": {}}',
        b'{"version": Infinity, "models": {}}',
        b"\xff\xfe",
    ],
)
def test_a_corrupt_file_stops_the_start_by_its_path(content: bytes, file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"config\.json"):
        ConfigStore(START, file)


def test_a_folder_in_place_of_the_file_stops_the_start(file: Path) -> None:
    file.mkdir(parents=True)
    with pytest.raises(SettingsError, match=r"config\.json"):
        ConfigStore(START, file)


def test_where_nothing_can_be_written_the_old_value_stays_in_force(file: Path) -> None:
    store = ConfigStore(START, file)
    version = store.version
    file.parent.write_text("a file where the folder should be")  # root may write into any folder
    with pytest.raises(EngineError, match="nothing changed"):
        store.set_r("tiny", 8)
    assert store.deployment("tiny") == Deployment(0, version)
    file.parent.unlink()
    assert store.set_r("tiny", 8) == Deployment(8, version + 1)


def test_a_full_disk_leaves_the_old_value_in_force(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ConfigStore(START, file)
    kept = store.set_r("tiny", 8)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EngineError, match="No space left"):
        store.set_r("tiny", 9)
    assert store.deployment("tiny") == ConfigStore(START, file).deployment("tiny") == kept


def test_a_change_outlives_a_start_without_its_model(file: Path) -> None:
    ConfigStore(START, file).set_r("tiny", 3)
    ConfigStore({"large": (4, 2)}, file).set_r("large", 1)
    again = ConfigStore(START, file)
    assert (again.deployment("tiny").r, again.deployment("large").r) == (3, 1)
