"""Photos for the commands: choosing them in a folder, and reading them for a model."""

from __future__ import annotations

import os
import random
from pathlib import Path

from server.errors import ServerError, SettingsError
from server.images.pillow import decode
from server.images.preprocessing import Preprocessing

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


def photos_in(folder: Path) -> list[Path]:
    """Image files of a folder and its subfolders, by suffix, sorted by path."""
    found = (Path(where, name) for where, _, names in os.walk(folder) for name in names)
    return sorted(file for file in found if file.suffix.lower() in SUFFIXES)


def choose_photos(folder: Path, count: int, seed: int, least: int = 2) -> list[Path]:
    """Image files of a folder and its subfolders, in random order.

    Args:
        folder: The folder.
        count: Most files.
        seed: Seed of the order, and of the choice if there are more.
        least: Fewest files.

    Raises:
        SettingsError: There are fewer.
    """
    files = photos_in(folder)
    if len(files) < least:
        raise SettingsError(f"{folder} holds {len(files)} images; at least {least} are needed")
    return random.Random(seed).sample(files, min(count, len(files)))


def read_photo(file: str, preprocessing: Preprocessing, max_pixels: int) -> bytes:
    """Reads and decodes a file like an upload of the service; returns rows of RGB bytes, height x width x 3.

    Raises:
        SettingsError: It cannot be read or decoded; the message names it.
    """
    try:
        return decode(Path(file).read_bytes(), preprocessing, max_pixels)
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except ServerError as error:
        raise SettingsError(f"{file}: {error.message}") from None
