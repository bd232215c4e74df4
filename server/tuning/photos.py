"""Photos for tuning, split into photos to learn from and judging photos."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from server.calibration.photos import read_photos
from server.cpus import available_cpus
from server.device.prepared import stacked
from server.errors import SettingsError
from server.images.photos import choose_photos, read_photo
from server.images.preprocessing import Preprocessing
from server.tuning import FEWEST
from server.types import ModelInfo

MARGIN = 1.2
"""Ratio of a learning photo's side to that of the model's photo before the crop, so that views enlarge less of it."""

JUDGES = 0.4
"""Share of judging photos. With 1,000 photos the gain over all `r` is then known to about two points."""


@dataclass(frozen=True)
class Photos:
    """Photos for tuning.

    Attributes:
        learned: Photos to learn from, (N, 3, H, W) uint8, larger than the model's input.
        judges: Judging photos, as the service sees them, (M, 3, H, W) uint8.
        sha256: Hash of the files, in their order.
    """

    learned: Tensor
    judges: Tensor
    sha256: str


def read(folder: Path, most: int, info: ModelInfo, max_pixels: int) -> Photos:
    """Reads photos of a folder, in a fixed order.

    Args:
        folder: The folder; subfolders are included.
        most: Most photos.
        info: The model.
        max_pixels: Largest width x height.

    Raises:
        SettingsError: There are too few, or one of them cannot be decoded.
    """
    files = choose_photos(folder, most, seed=0, least=FEWEST)
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError as error:
            raise SettingsError(f"{file}: {error.strerror}") from None
    judges = round(JUDGES * len(files))
    seen = stacked(read_photos(files[:judges], info, max_pixels), info.preprocessing.input_size, torch.device("cpu"))
    return Photos(
        learned=read_squares(files[judges:], info, max_pixels),
        judges=seen.permute(0, 3, 1, 2),
        sha256=digest.hexdigest(),
    )


def read_squares(files: Sequence[Path], info: ModelInfo, max_pixels: int) -> Tensor:
    """Squares from the middle of photos, with a margin around the model's view: (N, 3, H, W) uint8.

    Args:
        files: Their files.
        info: The model.
        max_pixels: Largest width x height.

    Raises:
        SettingsError: One of them cannot be decoded.
    """
    seen = info.preprocessing
    height, width = (round(MARGIN * side) for side in seen.resize_size)
    wide = replace(seen, input_size=(height, width), resize_size=(height, width))
    squares = torch.empty(len(files), 3, height, width, dtype=torch.uint8)  # often gigabytes, so there is no copy of it

    def fill(i: int) -> None:
        pixels = read_photo(str(files[i]), wide, max_pixels)
        squares[i] = stacked([pixels], wide.input_size, squares.device)[0].permute(2, 0, 1)

    with ThreadPoolExecutor(available_cpus()) as pool:
        list(pool.map(fill, range(len(files))))
    return squares


def normalised(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalises pixels (B, 3, H, W) from 0 to 1 for the model."""
    mean, std = (
        torch.tensor(each, device=pixels.device).view(3, 1, 1) for each in (preprocessing.mean, preprocessing.std)
    )
    return (pixels - mean) / std
