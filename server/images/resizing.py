"""Pillow's antialiased resizing in plain PyTorch: images of different sizes by two matrix products.

It is for images that are decoded on the CPU, and the reference for `server.images.resize_kernel` on a GPU.

Pillow's rule (the filter is stretched by the factor of reduction, its weights sum to one) is linear along each axis. So
an axis is a matrix of weights: across first, then down, rounded to integers after both, as in Pillow. (Pillow 13 goes
down first if it drops more than twice as many rows as columns. The rounding then differs, which hardly shows in a
photo.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.images.preprocessing import Preprocessing

GROUP_PIXELS = 1 << 24
"""Most pixels of images that are padded to one size and resized together: 200 MB in float32."""

MOST_PADDING = 2.0
"""Largest ratio of such a group's size to its images' size."""


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).to(x.dtype)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _hamming(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, torch.sinc(x) * (0.54 + 0.46 * torch.cos(math.pi * x)), 0)


def _cubic(x: Tensor) -> Tensor:
    a, x = -0.5, x.abs()
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where((x >= -3) & (x < 3), torch.sinc(x) * torch.sinc(x / 3), 0)


FILTERS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "box": (0.5, _box),
    "bilinear": (1.0, _triangle),
    "hamming": (1.0, _hamming),
    "bicubic": (2.0, _cubic),
    "lanczos": (3.0, _lanczos),
}
"""Half of a filter's width, and the filter."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of one image.

    Attributes:
        size: Pixels of the file.
        resized: Pixels before the crop.
        start: The first of them that the crop keeps.
        low, high: The pixels of the file that the kept ones depend on.
    """

    size: int
    resized: int
    start: int
    low: int
    high: int


def resize(images: Sequence[Tensor], preprocessing: Preprocessing) -> Tensor:
    """Brings images to a model's input size, like `server.images.pillow`.

    Args:
        images: Each (3, H, W) in uint8, of any size, on one device.
        preprocessing: The model's sizes, crop and interpolation.

    Returns:
        (N, H, W, 3) in uint8, contiguous.
    """
    device = images[0].device
    resized = torch.empty(len(images), *preprocessing.input_size, 3, dtype=torch.uint8, device=device)
    placed = [axes(image.shape[2], image.shape[1], preprocessing) for image in images]
    for group in _groups([(x.high - x.low, y.high - y.low) for x, y in placed]):
        across, down = [placed[index][0] for index in group], [placed[index][1] for index in group]
        width, height = (max(axis.high - axis.low for axis in side) for side in (across, down))
        # Rows outermost, colours inside, so that each product is one matrix for each image.
        padded = torch.zeros(len(group), height, 3, width, device=device)
        for row, index, x, y in zip(padded, group, across, down, strict=True):
            cut = images[index][:, y.low : y.high, x.low : x.high]
            row[: cut.shape[1], :, : cut.shape[2]] = cut.transpose(0, 1)
        to_height, to_width = preprocessing.input_size
        by_columns = _weights(across, to_width, width, preprocessing.interpolation, device)
        by_rows = _weights(down, to_height, height, preprocessing.interpolation, device)
        narrow = _rounded(padded.flatten(1, 2) @ by_columns.mT).view(len(group), height, 3 * to_width)
        small = _rounded(by_rows @ narrow).view(len(group), to_height, 3, to_width)
        resized[group] = small.transpose(2, 3).to(torch.uint8)
    return resized


def axes(width: int, height: int, preprocessing: Preprocessing) -> tuple[Axis, Axis]:
    """Across and down, for an image of this size."""
    resized = preprocessing.resized(width, height)
    corner, kept = preprocessing.crop_corner(*resized), preprocessing.input_size[::-1]
    half = FILTERS.get(preprocessing.interpolation, (0.5, _box))[0]
    across, down = (_axis(*each, half=half) for each in zip((width, height), resized, corner, kept, strict=True))
    return across, down


def _axis(size: int, resized: int, start: int, kept: int, half: float) -> Axis:
    scale = size / resized
    reach = half * max(scale, 1.0) + 1  # one more than the rule's, for any rounding
    first, last = max(start, 0), min(start + kept, resized)
    low = max(int((first + 0.5) * scale - reach), 0)
    high = min(math.ceil((last - 0.5) * scale + reach), size)
    return Axis(size, resized, start, low, high)


def _groups(sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Groups of indices whose images are padded to one size: similar ones, within a limit of memory."""
    group: list[int] = []
    width = height = pixels = 0
    for index in sorted(range(len(sizes)), key=lambda index: sizes[index][0] * sizes[index][1]):
        wider, higher = max(width, sizes[index][0]), max(height, sizes[index][1])
        more, padded = pixels + sizes[index][0] * sizes[index][1], (len(group) + 1) * wider * higher
        if group and (padded > GROUP_PIXELS or padded > MOST_PADDING * more):
            yield group
            group, pixels, (wider, higher) = [], 0, sizes[index]
            more = wider * higher
        group.append(index)
        width, height, pixels = wider, higher, more
    yield group


def _weights(axes: Sequence[Axis], kept: int, width: int, interpolation: str, device: torch.device) -> Tensor:
    """Weights (N, kept, width) of the file's pixels, from `low` on, for each kept pixel; 0 outside.

    In float64, as in Pillow, so that a pixel at the edge of a filter falls on the same side of it.
    """
    facts = [(axis.size, axis.resized, axis.start, axis.low) for axis in axes]
    table = torch.tensor(facts, dtype=torch.float64).to(device)
    size, resized, start, low = table.T[:, :, None, None]
    outputs = start + torch.arange(kept, dtype=torch.float64, device=device)[:, None]
    inputs = low + torch.arange(width, dtype=torch.float64, device=device)
    scale = size / resized
    centre = (outputs + 0.5) * scale
    if interpolation == "nearest":  # at the edge of two pixels, Pillow, which accumulates, may take the other one
        weights = (inputs == centre.floor()).to(torch.float64)
    else:
        half, shape = FILTERS[interpolation]
        stretch = scale.clamp(min=1)
        first = (centre - half * stretch + 0.5).trunc().clamp(min=0)
        end = torch.minimum((centre + half * stretch + 0.5).trunc(), size)
        weights = shape((inputs - centre + 0.5) * (1 / stretch)) * ((inputs >= first) & (inputs < end))
        weights /= weights.sum(-1, keepdim=True)
    return torch.where((outputs >= 0) & (outputs < resized), weights, 0).float()


def _rounded(pixels: Tensor) -> Tensor:
    """Rounds to integers from 0 to 255; halves go up, as in Pillow."""
    return pixels.add_(0.5).floor_().clamp_(0, 255)
