"""Photos of a folder, as calibrate and tune take them: which, in what order, and what is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from server.calibration import photos
from server.calibration.photos import read_photos
from server.device.models import LoadedModel, load_model
from server.errors import SettingsError
from server.images.photos import choose_photos
from server.model_spec import ModelSpec
from tests.server.conftest import encode, model_info

PIXELS = 1_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures of noise, one of them in a folder below, beside a file that is none."""
    (tmp_path / "below").mkdir()
    torch.manual_seed(0)
    for index in range(12):
        noise = Image.frombytes("RGB", (40, 36), bytes(torch.randint(256, (40 * 36 * 3,)).tolist()))
        (tmp_path / ("below" if index == 0 else ".") / f"{index:02}.PNG").write_bytes(encode(noise))
    (tmp_path / "labels.csv").write_text("file,label\n")
    return tmp_path


@pytest.fixture
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(ModelSpec.model_validate({"source": f"local-dir:{tiny_folder}"}))


def photos_of(loaded: LoadedModel, folder: Path, count: int = 100, seed: int = 0) -> list[bytes]:
    return read_photos(choose_photos(folder, count, seed), loaded.info, PIXELS)


def test_photos_come_in_an_order_that_the_seed_decides(loaded: LoadedModel, folder: Path) -> None:
    orders = [photos_of(loaded, folder, seed=seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) and len(set(orders[0])) == 12


def test_no_more_photos_are_read_than_asked_for(loaded: LoadedModel, folder: Path) -> None:
    assert len(photos_of(loaded, folder, 7)) == 7


@pytest.mark.parametrize("name", ["nothing", "below"])
def test_a_folder_of_fewer_than_two_photos_is_refused(name: str, loaded: LoadedModel, folder: Path) -> None:
    with pytest.raises(SettingsError, match=rf"{name} holds [01] images; at least 2"):
        choose_photos(folder / name, 100, seed=0)


def test_a_broken_photo_is_named(loaded: LoadedModel, folder: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(SettingsError, match="broken.jpg"):
        photos_of(loaded, folder)


def test_as_many_photos_are_decoded_at_once_as_there_are_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Threads(ThreadPoolExecutor):
        def __init__(self, most: int | None = None) -> None:
            asked.append(most or 0)
            super().__init__(most)

    monkeypatch.setattr(photos, "available_cpus", lambda: 3)
    monkeypatch.setattr(photos, "ThreadPoolExecutor", Threads)
    Image.new("RGB", (9, 9)).save(tmp_path / "photo.png")
    assert len(read_photos([tmp_path / "photo.png"], model_info(), PIXELS)) == 1
    assert asked == [3]
