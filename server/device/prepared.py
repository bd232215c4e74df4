"""Images that are ready to be computed: rows of batches of pixels on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from server.images.image import Pixels
from server.ipc.messages import Item

if TYPE_CHECKING:
    from server.device.runner import Launched


@dataclass(slots=True, eq=False)
class PixelBatch:
    """Images side by side on the device.

    Attributes:
        pixels: (B, H, W, 3) in uint8.
        launched: The computation of all of them, if it has begun.
    """

    pixels: Tensor
    launched: Launched | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """An item whose image is ready: one row of a batch."""

    item: Item
    batch: PixelBatch
    row: int


def joined(items: Sequence[Item], input_size: tuple[int, int], device: torch.device) -> Tensor:
    """The pixels of items without files: a batch (B, H, W, 3) in uint8, on the device."""
    images = [item.image for item in items]
    assert all(isinstance(image, Pixels) for image in images), "files go to an engine that decodes"
    return stacked([image.data for image in images], input_size, device)


def stacked(images: Sequence[bytes], input_size: tuple[int, int], device: torch.device) -> Tensor:
    """Images as rows of RGB bytes to a batch (B, H, W, 3) in uint8, on the device."""
    packed = torch.frombuffer(bytearray().join(images), dtype=torch.uint8)
    return packed.view(len(images), *input_size, 3).to(device)


def rows(prepared: Sequence[Prepared]) -> Tensor:
    """The pixels of these images; the whole batch in which they were prepared, if they are all of it."""
    if is_whole(prepared):
        return prepared[0].batch.pixels
    return torch.stack([each.batch.pixels[each.row] for each in prepared])


def is_whole(prepared: Sequence[Prepared]) -> bool:
    """Whether these are all images of one batch, in order."""
    batch = prepared[0].batch
    return len(prepared) == len(batch.pixels) and all(
        each.batch is batch and each.row == row for row, each in enumerate(prepared)
    )
