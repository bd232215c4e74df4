"""A photo from the command line, as the model of a command wants it."""

from __future__ import annotations

from pathlib import Path

from server.api.decode import decode
from server.errors import ServerError
from server.settings import SettingsError
from server.types import Preprocessing


def read_photo(file: str, preprocessing: Preprocessing, max_pixels: int) -> bytes:
    """Reads and decodes a file as the service decodes an upload; gives rows of RGB bytes, height x width x 3.

    Raises:
        SettingsError: It cannot be read or decoded; the message names it.
    """
    try:
        return decode(Path(file).read_bytes(), preprocessing, max_pixels)
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except ServerError as error:
        raise SettingsError(f"{file}: {error.message}") from None
