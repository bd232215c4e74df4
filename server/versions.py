"""Model folders with versions, `FOLDER/1`, `FOLDER/2`, and folders of model folders. Models are not read here."""

from __future__ import annotations

import re
from pathlib import Path

from server.errors import InvalidError, shown

_CONFIG = "config.json"
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")

UNVERSIONED = "1"
"""The version of a model without numbered folders."""


def versions_in(folder: Path) -> list[str]:
    """The numbered folders that hold a model, oldest first. A folder that is a model itself has one version."""
    if (folder / _CONFIG).exists():
        return [UNVERSIONED]
    try:
        names = [each.name for each in folder.iterdir() if _NUMBER.fullmatch(each.name)]
    except OSError:  # there is no such folder, or it cannot be read
        return []
    return sorted((name for name in names if (folder / name / _CONFIG).exists()), key=int)


def find_version(folder: Path, version: str | None = None) -> tuple[Path, str]:
    """The folder and number of a version; the newest if `version` is None.

    A folder without a model is returned as it is, so that its reader can say what is missing.

    Raises:
        InvalidError: There is no such version.
    """
    there = versions_in(folder)
    if version is None:
        version = there[-1] if there else UNVERSIONED
    elif version not in there:
        known = ", ".join(there) or "none"
        raise InvalidError(f"{folder} has no version {shown(version)}; it has: {known}")
    is_plain = not there or (folder / _CONFIG).exists()
    return (folder if is_plain else folder / version), version


def models_in(folder: Path) -> list[str]:
    """The names of the models in a folder of model folders, sorted.

    Raises:
        InvalidError: The folder cannot be read.
    """
    try:
        names = sorted(each.name for each in folder.iterdir() if _NAME.fullmatch(each.name))
    except OSError as error:
        raise InvalidError(f"the model repository {folder} cannot be read: {error.strerror}") from None
    return [name for name in names if versions_in(folder / name)]
