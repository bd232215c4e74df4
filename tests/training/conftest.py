"""A handful of images as the training reads them, small models, and a way to run its programs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from tests.training.members import SMALL_STUDENT, SMALL_TEACHER
from training import student, teacher
from training.data import Split

WNIDS: list[str] = ImageNetInfo().label_names()[:200]
NAMES = [f"thing {label}" for label in range(200)]
TRAIN_LABELS = [7, 199, 0, 42, 7, 128]
VAL_LABELS = [3, 0, 199, 55]
STEPS = len(TRAIN_LABELS) // 2  # of an epoch at --batch-size 2


class DataSet(NamedTuple):
    """A folder as the training reads it, and the splits that lie there."""

    folder: Path
    train: Split
    val: Split


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """Lossless images, so that the pixels are known; the classes are listed backwards."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    train_images, val_images = (
        torch.randint(256, (len(labels), 3, 64, 64), dtype=torch.uint8, generator=generator)
        for labels in (TRAIN_LABELS, VAL_LABELS)
    )
    train_images[1] = train_images[1, :1]  # a grey one
    write(folder / "train-00000.parquet", train_images[:4], TRAIN_LABELS[:4])
    write(folder / "train-00001.parquet", train_images[4:], TRAIN_LABELS[4:])
    write(folder / "val-00000.parquet", val_images, VAL_LABELS)
    rows = [f"{label},{WNIDS[label]},{NAMES[label]}" for label in reversed(range(200))]
    (folder / "classes.csv").write_text("\n".join(["label,wnid,name", *rows]) + "\n")
    splits = Split(train_images, torch.tensor(TRAIN_LABELS)), Split(val_images, torch.tensor(VAL_LABELS))
    return DataSet(folder, *splits)


def write(file: Path, images: Tensor, labels: list[int]) -> None:
    """One parquet file of encoded images; grey ones are stored as grey."""
    encoded = []
    for image in images:
        grey = bool((image == image[:1]).all())
        picture = Image.fromarray(image[0].numpy()) if grey else Image.fromarray(image.permute(1, 2, 0).numpy())
        buffer = io.BytesIO()
        picture.save(buffer, "PNG" if grey else "WEBP", **({} if grey else {"lossless": True}))
        encoded.append(buffer.getvalue())
    parquet.write_table(pa.table({"image": encoded, "label": labels}), file)


@pytest.fixture(scope="session")
def small_models() -> Iterator[None]:
    """Student and teacher, both small."""
    with pytest.MonkeyPatch.context() as patch:
        for arguments, small in ((student.MODEL_ARGS, SMALL_STUDENT), (teacher.MODEL_ARGS, SMALL_TEACHER)):
            for name, value in small.items():
                patch.setitem(arguments, name, value)
        yield


@pytest.fixture(scope="session")
def teacher_weights(small_models: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that nobody fitted."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(timm.create_model(teacher.ARCHITECTURE, num_classes=200, **teacher.MODEL_ARGS).state_dict(), file)
    return file


def said_by(patch: pytest.MonkeyPatch, main: Callable[[], None], *arguments: object) -> list[str]:
    """Runs a program on the CPU with arguments; gives the lines that it prints."""
    patch.setattr("sys.argv", ["program", "--device", "cpu", *map(str, arguments)])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main()
    return out.getvalue().splitlines()
