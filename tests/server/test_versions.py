"""Folders of versions, and folders of models: what is found there, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidError, NotFoundError, SettingsError
from server.model_spec import ModelSpec
from server.settings_sources import load_settings
from server.versions import find_version, models_in, versions_in


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@given(st.sets(st.integers(1, 10**6), min_size=1, max_size=12))
def test_versions_are_ordered_as_numbers_and_the_newest_is_found(numbers: set[int]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in numbers:
            model(folder / str(number))
        assert versions_in(folder) == [str(number) for number in sorted(numbers)]
        assert find_version(folder) == (folder / str(max(numbers)), str(max(numbers)))
        for number in numbers:
            assert find_version(folder, str(number)) == (folder / str(number), str(number))


def test_only_numbered_folders_that_hold_a_model_are_versions(tmp_path: Path) -> None:
    for name in ("2", "10", "01", "-1", "1.5", "two", "3x"):
        model(tmp_path / name)
    (tmp_path / "11").mkdir()  # which is being written
    (tmp_path / "12").write_text("no folder")
    assert versions_in(tmp_path) == ["2", "10"]
    for version in ("11", "01", "7", "../2", ""):
        with pytest.raises(InvalidError, match=r"has no version .*; it has: 2, 10"):
            find_version(tmp_path, version)


def test_a_folder_that_is_a_model_is_its_one_version(tmp_path: Path) -> None:
    model(tmp_path / "cats")
    model(tmp_path / "cats/2")  # whatever lies below it
    for version in (None, "1"):
        assert find_version(tmp_path / "cats", version) == (tmp_path / "cats", "1")
    with pytest.raises(InvalidError, match="has no version '2'; it has: 1"):
        find_version(tmp_path / "cats", "2")


def test_a_folder_without_a_model_is_left_to_whoever_reads_it(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert versions_in(folder) == [] and find_version(folder) == (folder, "1")
        with pytest.raises(InvalidError, match="it has: none"):
            find_version(folder, "1")


def test_a_repository_lists_what_holds_a_model_under_a_name_that_a_model_may_have(tmp_path: Path) -> None:
    model(tmp_path / "dogs")
    model(tmp_path / "cats/3")
    model(tmp_path / "no name")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert models_in(tmp_path) == ["cats", "dogs"]
    with pytest.raises(InvalidError, match="cannot be read: No such file"):
        models_in(tmp_path / "missing")


def spec_of(text: str) -> ModelSpec:
    return load_settings({"model": [text]}).specs()[0]


def test_a_model_is_served_in_the_version_that_is_named_else_in_the_newest(tmp_path: Path) -> None:
    for version in ("1", "2", "10"):
        model(tmp_path / "cats" / version)
    folder = tmp_path / "cats"
    for said, version in (("", "10"), (",version=2", "2"), (",r=3,version=1", "1")):
        spec = spec_of(f"local-dir:{folder}{said}")
        assert (spec.source, spec.version, spec.name) == (f"local-dir:{folder}/{version}", version, "cats")
    with pytest.raises(SettingsError, match="model cats: .*/cats has no version '3'; it has: 1, 2, 10"):
        spec_of(f"local-dir:{folder},version=3")
    written = {"source": f"local-dir:{folder}", "version": 2}  # as YAML has it
    assert load_settings({"model": [written]}).specs()[0].source == f"local-dir:{folder}/2"


def test_a_version_goes_with_a_folder() -> None:
    with pytest.raises(SettingsError, match="version goes with local-dir:FOLDER, not with bundled"):
        spec_of("bundled,version=2")


def test_what_may_be_loaded_is_what_the_settings_name(tmp_path: Path) -> None:
    model(tmp_path / "cats/1")
    model(tmp_path / "dogs")
    said = {"model": ["bundled,name=dogs,r=3"], "model_repository": str(tmp_path), "r": "5", "tuned": "none"}
    settings = load_settings(said)
    assert settings.known_models() == ["dogs", "cats"]
    assert settings.spec("dogs").source == "bundled", "--model goes before the repository"
    assert settings.spec("cats") == ModelSpec(source=f"local-dir:{tmp_path}/cats", name="cats", tuned="none", r=5)
    for name in ("../cats", "cats/1", ".", "..", "", "birds", str(tmp_path / "cats")):
        with pytest.raises(NotFoundError, match="no model .* to load; there are: dogs, cats"):
            settings.spec(name)


def test_the_weights_and_tuned_numbers_of_the_one_model_are_not_those_of_the_repository(tmp_path: Path) -> None:
    model(tmp_path / "cats")
    settings = load_settings(
        {"weights": "a.safetensors", "tuned": "a.tuned.safetensors", "model_repository": str(tmp_path)}
    )
    assert (settings.spec("cats").weights, settings.spec("cats").tuned) == (None, "auto")
