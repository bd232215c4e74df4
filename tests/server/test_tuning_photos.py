"""Photos to tune on: parted the same way on every machine, as the service sees them, or an error that names one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from server.errors import SettingsError
from server.tuning import FEWEST
from server.tuning.photos import Photos, read, read_squares
from tests.server.conftest import SIDE, encode, grey_png, model_info

COUNT, LARGEST = 60, 10_000


def written(folder: Path, greys: Sequence[int]) -> Path:
    """Photos of one grey each, half of them in a folder below; in the order given."""
    (folder / "below").mkdir(parents=True)
    for grey in greys:
        (folder / ("below" if grey % 2 else "") / f"{grey}.png").write_bytes(grey_png(grey))
    return folder


def greys(photos: torch.Tensor) -> list[int]:
    assert bool((photos == photos[:, :1, :1, :1]).all())
    found: list[int] = photos[:, 0, 0, 0].tolist()
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "photos", range(COUNT))


def taken(folder: Path, most: int = 1000) -> Photos:
    return read(folder, most, model_info(), LARGEST)


def test_two_fifths_judge_and_no_photo_does_both(folder: Path) -> None:
    photos = taken(folder)
    assert photos.judges.shape == (24, 3, SIDE, SIDE) and photos.learned.shape == (36, 3, 10, 10)
    assert photos.judges.dtype == photos.learned.dtype == torch.uint8
    assert sorted(greys(photos.judges) + greys(photos.learned)) == list(range(COUNT))
    assert greys(photos.judges) != sorted(greys(photos.judges))


def test_they_are_the_same_whatever_the_file_system_lists_first(folder: Path, tmp_path: Path) -> None:
    photos = taken(folder)
    others = taken(written(tmp_path / "moved here", range(COUNT - 1, -1, -1)))
    assert torch.equal(photos.judges, others.judges) and torch.equal(photos.learned, others.learned)
    assert photos.sha256 == others.sha256


def test_other_photos_have_another_hash(folder: Path) -> None:
    before = taken(folder).sha256
    assert taken(folder, COUNT - 1).sha256 != before
    (folder / "0.png").write_bytes(grey_png(200))
    assert taken(folder).sha256 != before


def test_no_more_are_taken_than_asked_for(folder: Path) -> None:
    photos = taken(folder, FEWEST)
    assert (len(photos.judges), len(photos.learned)) == (20, 30)


def test_too_few_are_said(folder: Path) -> None:
    for grey in range(0, 22, 2):
        (folder / f"{grey}.png").unlink()
    with pytest.raises(SettingsError, match="holds 49 images; at least 50 are needed"):
        taken(folder)
    with pytest.raises(SettingsError, match="nowhere holds 0 images"):
        taken(folder / "nowhere")


def not_decodable(file: Path) -> None:
    file.write_bytes(b"no photo")


def too_large(file: Path) -> None:
    file.write_bytes(encode(Image.new("RGB", (200, 60))))


@pytest.mark.parametrize("spoil", [not_decodable, too_large])
def test_a_photo_that_cannot_be_read_is_named(folder: Path, spoil: Callable[[Path], None]) -> None:
    spoil(folder / "below" / "7.png")
    with pytest.raises(SettingsError, match=r"below/7\.png: "):
        taken(folder)


def test_a_folder_that_is_named_like_a_photo_is_none(folder: Path) -> None:
    before = taken(folder).sha256
    (folder / "below" / "more.png").mkdir()
    assert taken(folder).sha256 == before


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_photos_of_every_kind_become_rgb(mode: str, tmp_path: Path) -> None:
    file = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    file.write_bytes(encode(Image.new("L", (30, 20), 255).convert(mode), "JPEG" if mode == "CMYK" else "PNG"))
    (square,) = read_squares([file], model_info(), LARGEST)
    assert square.shape == (3, 10, 10) and square.min() > 250


def test_a_square_shows_a_margin_around_what_the_model_sees(tmp_path: Path) -> None:
    """Of a photo twice as wide as high, the middle is kept: columns 5 to 15 of 20."""
    pixels = torch.arange(20, dtype=torch.uint8).mul(10).view(1, 20, 1).expand(10, 20, 3)
    (tmp_path / "photo.png").write_bytes(encode(Image.fromarray(pixels.numpy())))
    (square,) = read_squares([tmp_path / "photo.png"], model_info(), LARGEST)
    assert torch.equal(square, pixels[:, 5:15].permute(2, 0, 1))
