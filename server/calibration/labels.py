"""The classes of photos, from a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from server.errors import SettingsError


def read_labels(table: Path, files: Sequence[Path], folder: Path, num_classes: int) -> list[int | None]:
    """The class of each photo; None if the table does not list it.

    Args:
        table: CSV with the columns `file`, a path within the folder, and `label`, the index of a class.
        files: The photos.
        folder: Their folder.
        num_classes: Number of the model's classes.

    Raises:
        SettingsError: It cannot be read, a label is not a class, or it lists none of the photos.
    """
    try:
        with table.open(newline="") as file:
            listed = {row["file"]: _class(row["label"], table, num_classes) for row in csv.DictReader(file)}
    except OSError as error:
        raise SettingsError(f"--labels is {table}: {error.strerror}") from None
    except (KeyError, UnicodeDecodeError, csv.Error):
        raise SettingsError(f"--labels is {table}: it must be a CSV table with the columns file and label") from None
    labels = [listed.get(file.relative_to(folder).as_posix()) for file in files]
    if all(label is None for label in labels):
        raise SettingsError(f"--labels is {table}: it lists none of the photos in {folder}")
    return labels


def _class(text: str | None, table: Path, num_classes: int) -> int:
    if text is None or not text.isdecimal() or int(text) >= num_classes:
        raise SettingsError(f"--labels is {table}: the label {text!r} must be a number from 0 to {num_classes - 1}")
    return int(text)
