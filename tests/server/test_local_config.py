"""The live configuration: versions, restarts, conflicts, and files that cannot be read or written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from server.config.local import LocalConfig
from server.dial import RSetting
from server.errors import ConflictError, EngineError
from server.types import Configuration

START: dict[str, RSetting] = {"tiny": 0, "large": (4, 2)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "config.json"


def test_the_start_setting_is_in_force_until_a_change(file: Path) -> None:
    store = LocalConfig(START, file)
    assert store.configuration.models == START
    assert not file.exists()


@pytest.mark.parametrize("r", [8, 0, (8, 4, 2)])
async def test_a_change_raises_the_version_by_one_and_leaves_other_models_alone(r: RSetting, file: Path) -> None:
    store = LocalConfig(START, file)
    version = store.configuration.version
    assert await store.change({"tiny": r}) == store.configuration == Configuration(version + 1, START | {"tiny": r})
    assert store.configuration.models["large"] == (4, 2)


@pytest.mark.parametrize("r", [8, (8, 4, 2)])
async def test_a_change_survives_a_restart_with_its_version(r: RSetting, file: Path) -> None:
    await LocalConfig(START, file).change({"tiny": 3})
    changed = await LocalConfig(START, file).change({"tiny": r})
    assert LocalConfig(START, file).configuration == changed
    assert LocalConfig(START, file).configuration.models["large"] == (4, 2)


async def test_without_a_file_a_change_lives_in_memory() -> None:
    store = LocalConfig(START)
    await store.change({"tiny": 8})
    assert store.configuration.models["tiny"] == 8
    assert LocalConfig(START).configuration.models["tiny"] == 0


async def test_a_changed_start_setting_wins_over_the_earlier_live_change(file: Path) -> None:
    changed = await LocalConfig(START, file).change({"tiny": 8})
    restarted = LocalConfig(START | {"tiny": 5}, file)
    assert restarted.configuration.models["tiny"] == 5
    assert restarted.configuration.version > changed.version  # the configuration did change: an old ETag must not fit


async def test_a_changed_start_setting_of_one_model_leaves_the_live_change_of_another(file: Path) -> None:
    store = LocalConfig(START, file)
    await store.change({"tiny": 8})
    await store.change({"large": 1})
    restarted = LocalConfig(START | {"tiny": 5}, file)
    assert (restarted.configuration.models["tiny"], restarted.configuration.models["large"]) == (5, 1)


async def test_a_model_that_is_no_longer_served_is_forgotten(file: Path) -> None:
    await LocalConfig(START, file).change({"tiny": 8})
    assert LocalConfig({"large": 2}, file).configuration.models["large"] == 2


async def test_a_stale_version_is_a_conflict_and_changes_nothing(file: Path) -> None:
    store = LocalConfig(START, file)
    first = store.configuration.version
    await store.change({"tiny": 8}, first)
    with pytest.raises(ConflictError) as conflict:
        await store.change({"tiny": 9}, first)
    assert conflict.value.details == {"config_version": first + 1}
    assert (
        store.configuration == LocalConfig(START, file).configuration == Configuration(first + 1, START | {"tiny": 8})
    )


async def test_each_write_leaves_one_whole_file(file: Path) -> None:
    store = LocalConfig(START, file)
    for r in range(5):
        await store.change({"tiny": r})
        assert json.loads(file.read_text())["models"]["tiny"]["r"] == r
        assert {each.name for each in file.parent.iterdir()} == {"config.json", "config.good.json", "config.lock"}


async def test_a_write_that_a_crash_cut_short_leaves_the_old_value(file: Path) -> None:
    await LocalConfig(START, file).change({"tiny": 8})
    file.with_suffix(f".{os.getpid()}.new").write_text('{"version": 9, "mod')
    store = LocalConfig(START, file)
    assert store.configuration.models["tiny"] == 8
    await store.change({"tiny": 4})
    assert LocalConfig(START, file).configuration.models["tiny"] == 4


async def test_where_nothing_can_be_written_the_old_value_stays_in_force(file: Path) -> None:
    store = LocalConfig(START, file)
    version = store.configuration.version
    file.parent.write_text("a file where the folder should be")  # root may write into any folder
    with pytest.raises(EngineError, match="nothing changed"):
        await store.change({"tiny": 8})
    assert store.configuration == Configuration(version, START | {"tiny": 0})
    file.parent.unlink()
    assert await store.change({"tiny": 8}) == Configuration(version + 1, START | {"tiny": 8})


async def test_a_full_disk_leaves_the_old_value_in_force(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalConfig(START, file)
    kept = await store.change({"tiny": 8})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(EngineError, match="No space left"):
        await store.change({"tiny": 9})
    assert store.configuration == LocalConfig(START, file).configuration == kept


async def test_a_change_outlives_a_start_without_its_model(file: Path) -> None:
    await LocalConfig(START, file).change({"tiny": 3})
    await LocalConfig({"large": (4, 2)}, file).change({"large": 1})
    again = LocalConfig(START, file)
    assert (again.configuration.models["tiny"], again.configuration.models["large"]) == (3, 1)
