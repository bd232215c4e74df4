"""Tiny ImageNet from parquet files: every image of a split as one uint8 tensor, small enough for the device."""

from __future__ import annotations

import csv
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch import Tensor


class Split(NamedTuple):
    """Images (n, 3, 64, 64) uint8 and labels (n,) int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


class Labels(NamedTuple):
    """The 200 classes in label order: WordNet ids, and their names."""

    wnids: list[str]
    names: list[str]


def load_split(folder: Path, split: str, cache: Path | None = None) -> Split:
    """Reads `split*.parquet` (columns `image`, encoded bytes, and `label`) from a folder.

    Args:
        folder: The folder of parquet files.
        split: "train" or "val".
        cache: Folder that keeps decoded pixels for the next start.

    Raises:
        FileNotFoundError: The folder has no file of the split.
    """
    cached = cache / f"{split}.pt" if cache else None
    if cached and cached.exists():
        return Split(*torch.load(cached, weights_only=True))
    files = sorted(folder.glob(f"{split}*.parquet"))
    if not files:
        raise FileNotFoundError(f"no {split}*.parquet in {folder}")
    tables = [parquet.read_table(file) for file in files]
    encoded = [image for table in tables for image in table["image"].to_pylist()]
    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter while it decodes
        pixels = list(pool.map(_decode, encoded))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([label for table in tables for label in table["label"].to_pylist()])
    if cached:
        cached.parent.mkdir(parents=True, exist_ok=True)
        new = cached.with_suffix(f".{os.getpid()}")
        torch.save((images, labels), new)
        new.rename(cached)  # atomic, because another process may be reading
    return Split(images, labels)


def load_labels(folder: Path) -> Labels:
    """Reads `classes.csv` (columns label, wnid, name, in label order)."""
    with (folder / "classes.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["label"]))
    return Labels([row["wnid"] for row in rows], [row["name"] for row in rows])


def _decode(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
