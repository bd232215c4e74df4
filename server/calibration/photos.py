"""Reads photos from files, preprocessed for a model."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from server.cpus import available_cpus
from server.images.photos import read_photo
from server.types import ModelInfo


def read_photos(files: Sequence[Path], info: ModelInfo, max_pixels: int) -> list[bytes]:
    """Reads images, preprocessed for a model.

    Args:
        files: Their files.
        info: The model.
        max_pixels: Largest width x height.

    Raises:
        SettingsError: One of them cannot be decoded.
    """
    with ThreadPoolExecutor(available_cpus()) as pool:
        return list(pool.map(lambda file: read_photo(str(file), info.preprocessing, max_pixels), files))
