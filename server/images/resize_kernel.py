"""Planes of JPEGs to a model's pixels, by four launches a batch, equal to Pillow's byte for byte.

The planes become pixels by libjpeg's rules: colours of half the size are interpolated (`_colour`). Pillow's filter then
sums the pixels across, and then down; the values in between are bytes. The weights are Pillow's integers with 22
fractional bits, so that sums are exact in any order. They are computed in float64 without fused multiply-add, which
would move a pixel at the edge of a filter to the other side.

`server.images.resizing` is the same in plain PyTorch, for images that are decoded elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from server.images.preprocessing import Preprocessing
from server.images.resizing import FILTERS, axes
from tome_core.kernels.launch import Kernel, ceil_div

LUMA, CB, CR, LINE, COLOUR_LINE = range(5)
"""Columns of the table: addresses of the planes, and the distances of their lines."""
WIDTH, HEIGHT, COLOUR_WIDTH, COLOUR_HEIGHT, HALF_WIDTH, HALF_HEIGHT, IS_GREY = range(5, 12)
"""Sizes of the file and of its colour planes, whether those have half the width and height, and whether they have no
meaning. They must then still point to some plane, because it is read.
"""
ROW = 12
"""Place in the batch."""
GIVEN = 13
_FIELDS = GIVEN + 10
"""Then values that follow from the sizes: resized width and height, left and top of the crop, the number of taps across
and down, the first needed line, the number of needed lines, and their places as pixels and as narrow lines.
"""

_PIXELS, _OUTPUTS, _ROWS, _BYTES = 512, 64, 4, 256


@triton.jit
def _filter(x, FILTER: tl.constexpr):
    """Pillow's filters, unstretched."""
    if FILTER == "box":
        return tl.where((x > -0.5) & (x <= 0.5), 1.0, 0.0).to(tl.float64)
    if FILTER == "bilinear":
        return tl.maximum(1.0 - tl.abs(x), 0.0)
    if FILTER == "hamming":
        x = tl.abs(x)
        return tl.where(x < 1.0, _sinc(x) * (0.54 + 0.46 * tl.cos(x * 3.141592653589793)), 0.0)
    if FILTER == "bicubic":
        x = tl.abs(x)
        inner = (1.5 * x - 2.5) * x * x + 1.0
        outer = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
        return tl.where(x < 1.0, inner, tl.where(x < 2.0, outer, 0.0))
    if FILTER == "lanczos":
        return tl.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3.0), 0.0)
    return x * 0.0 + 1.0  # nearest


@triton.jit
def _sinc(x):
    x = x * 3.141592653589793
    return tl.where(x == 0.0, 1.0, tl.sin(x) / tl.where(x == 0.0, 1.0, x))


@triton.jit
def _weight(pixel, end, centre, stretch, FILTER: tl.constexpr):
    weight = _filter((pixel.to(tl.float64) - centre + 0.5) * (1.0 / stretch), FILTER)
    return tl.where(pixel < end, weight, 0.0)


@triton.jit(do_not_specialize=["stride"])
def _weigh(
    table, weights, stride,
    FIELDS: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr, HALF: tl.constexpr, FILTER: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """One program: OUTPUTS of an image's columns or rows: the first tap of each, and the weights."""
    axis, image = tl.program_id(1), tl.program_id(2)
    table += image * FIELDS + axis
    into = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    kept = into < tl.where(axis == 0, WIDTH, HEIGHT)
    size, resized, taps = tl.load(table + 5).to(tl.int32), tl.load(table + 13), tl.load(table + 17).to(tl.int32)
    output = into + tl.load(table + 15)
    scale = size.to(tl.float64) / resized.to(tl.float64)
    stretch = tl.maximum(scale, 1.0)
    centre = (output.to(tl.float64) + 0.5) * scale
    if FILTER == "nearest":
        first = centre.to(tl.int32)
        end = first + 1
    else:
        first = tl.maximum((centre - HALF * stretch + 0.5).to(tl.int32), 0)
        end = tl.minimum((centre + HALF * stretch + 0.5).to(tl.int32), size)
    end = tl.where((output >= 0) & (output < resized), end, first)
    total = tl.zeros([OUTPUTS], tl.float64)
    for tap in range(0, taps):
        total += _weight(first + tap, end, centre, stretch, FILTER)
    total = tl.where(total == 0.0, 1.0, total)
    weights += image.to(tl.int64) * stride * (WIDTH + HEIGHT) + axis * WIDTH + into
    tl.store(weights, first, kept)
    for tap in range(0, taps):
        weight = _weight(first + tap, end, centre, stretch, FILTER) / total * 4194304.0
        weight = tl.where(weight < 0.0, weight - 0.5, weight + 0.5)
        weights += WIDTH + HEIGHT
        tl.store(weights, weight.to(tl.int32), kept)


@triton.jit
def _byte(x):
    return tl.minimum(tl.maximum(x, 0), 255)


@triton.jit
def _colour(plane, near, far, column, beside, half_width, half_height, bias, shift, inside):
    """libjpeg's interpolation: three parts of the nearest line and column, one part of the next nearest."""
    above = tl.load(plane + near + column, inside, 0).to(tl.int32)
    above_beside = tl.load(plane + near + beside, inside, 0).to(tl.int32)
    below = tl.load(plane + far + column, inside, 0).to(tl.int32)
    below_beside = tl.load(plane + far + beside, inside, 0).to(tl.int32)
    here = tl.where(half_height, 3 * above + below, above)
    next_to = tl.where(half_height, 3 * above_beside + below_beside, above_beside)
    return ((tl.where(half_width, 3 * here + next_to, here) + bias) >> shift) - 128


@triton.jit
def _convert(table, pixels, FIELDS: tl.constexpr, PIXELS: tl.constexpr):
    """One program: PIXELS of an image's needed lines, from planes to red, green and blue."""
    table += tl.program_id(1) * FIELDS
    width, count = tl.load(table + 5).to(tl.int32), tl.load(table + 20).to(tl.int32)
    if tl.program_id(0) * PIXELS < width * count:
        luma = tl.load(table).to(tl.pointer_type(tl.uint8))
        cb = tl.load(table + 1).to(tl.pointer_type(tl.uint8))
        cr = tl.load(table + 2).to(tl.pointer_type(tl.uint8))
        line, colour_line = tl.load(table + 3).to(tl.int32), tl.load(table + 4).to(tl.int32)
        colour_width, colour_height = tl.load(table + 7).to(tl.int32), tl.load(table + 8).to(tl.int32)
        half_width, half_height, is_grey = tl.load(table + 9) > 0, tl.load(table + 10) > 0, tl.load(table + 11) > 0

        index = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        inside = index < width * count
        x, y = index % width, index // width + tl.load(table + 19).to(tl.int32)
        luminance = tl.load(luma + y * line + x, inside, 0).to(tl.int32)

        near = tl.where(half_height, y // 2, y)
        far = tl.where(y % 2 == 0, tl.maximum(near - 1, 0), tl.minimum(near + 1, colour_height - 1))
        near, far = near * colour_line, far * colour_line
        column = tl.where(half_width, x // 2, x)
        beside = tl.where(x % 2 == 0, tl.maximum(column - 1, 0), tl.minimum(column + 1, colour_width - 1))
        # Exact halves round up at one pixel and down at the next: along lines, or down columns if lines are whole.
        halved = tl.where(half_width, tl.where(x % 2 == 0, 1, 2), tl.where(y % 2 == 0, 1, 2))
        quartered = tl.where(x % 2 == 0, 8, 7)
        bias = tl.where(half_width & half_height, quartered, tl.where(half_width | half_height, halved, 0))
        shift = tl.where(half_width, 2, 0) + tl.where(half_height, 2, 0)
        u = _colour(cb, near, far, column, beside, half_width, half_height, bias, shift, inside)
        v = _colour(cr, near, far, column, beside, half_width, half_height, bias, shift, inside)
        u, v = tl.where(is_grey, 0, u), tl.where(is_grey, 0, v)

        # libjpeg's factors, with 16 fractional bits.
        red = luminance + ((91881 * v + 32768) >> 16)
        green = luminance + ((-22554 * u - 46802 * v + 32768) >> 16)
        blue = luminance + ((116130 * u + 32768) >> 16)
        out = pixels + tl.load(table + 21) + index * 3
        tl.store(out, _byte(red).to(tl.uint8), inside)
        tl.store(out + 1, _byte(green).to(tl.uint8), inside)
        tl.store(out + 2, _byte(blue).to(tl.uint8), inside)


@triton.jit(do_not_specialize=["stride", "width", "height"])
def _across(
    table, weights, pixels, narrow, stride, width, height,
    FIELDS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One program: PIXELS of an image's lines, resized to the model's width.

    All loads have one shape, and none is known to be contiguous. Otherwise Triton would lay out weights and pixels
    differently, and convert one of them at every step.
    """
    image = tl.program_id(1)
    table += image * FIELDS
    count = tl.load(table + 20).to(tl.int32) * width
    if tl.program_id(0) * PIXELS < count:
        size, taps = tl.load(table + 5).to(tl.int32), tl.load(table + 17).to(tl.int32)
        index = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        weight = weights + image.to(tl.int64) * stride * (width + height) + index % width
        x = tl.load(weight)
        pixel = pixels + tl.load(table + 21) + (index // width * size + x) * 3
        red = tl.zeros([PIXELS], tl.int32) + 2097152
        green, blue = red, red
        for _ in range(0, taps):
            weight += width + height
            inside = (index < count) & (x < size)
            factor = tl.load(weight)
            red += factor * tl.load(pixel, inside, 0).to(tl.int32)
            green += factor * tl.load(pixel + 1, inside, 0).to(tl.int32)
            blue += factor * tl.load(pixel + 2, inside, 0).to(tl.int32)
            x += 1
            pixel += 3
        out = narrow + tl.load(table + 22) + index * 3
        tl.store(out, _byte(red >> 22).to(tl.uint8), index < count)
        tl.store(out + 1, _byte(green >> 22).to(tl.uint8), index < count)
        tl.store(out + 2, _byte(blue >> 22).to(tl.uint8), index < count)


@triton.jit(do_not_specialize=["stride"])
def _down(
    table, weights, narrow, batch, stride,
    FIELDS: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """One program: ROWS of an image's HEIGHT rows, BYTES of the bytes of each."""
    image = tl.program_id(2)
    table += image * FIELDS
    count, taps = tl.load(table + 20).to(tl.int32), tl.load(table + 18).to(tl.int32)
    into = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    weight = weights + image.to(tl.int64) * stride * (WIDTH + HEIGHT) + WIDTH + into
    line = tl.load(weight, into < HEIGHT, 0) - tl.load(table + 19).to(tl.int32)
    narrow += tl.load(table + 22)
    added = tl.zeros([ROWS, BYTES], tl.int32) + 2097152
    for _ in range(0, taps):
        weight += WIDTH + HEIGHT
        factor = tl.load(weight, into < HEIGHT, 0)[:, None]
        inside = ((line >= 0) & (line < count))[:, None] & (byte < WIDTH * 3)[None, :]
        added += factor * tl.load(narrow + (line * (WIDTH * 3))[:, None] + byte[None, :], inside, 0).to(tl.int32)
        line += 1
    written = (into < HEIGHT)[:, None] & (byte < WIDTH * 3)[None, :]
    batch += tl.load(table + 12) * (HEIGHT * WIDTH * 3)
    tl.store(batch + (into * (WIDTH * 3))[:, None] + byte[None, :], _byte(added >> 22).to(tl.uint8), written)


def resize(images: NDArray[np.int64], preprocessing: Preprocessing, batch: Tensor) -> None:
    """Brings decoded JPEGs to a model's input size, like `server.images.pillow`.

    Args:
        images: (N, `GIVEN`), a row an image. Their planes lie on the batch's device, and must stay until it is done.
        preprocessing: The model's sizes, crop and interpolation.
        batch: The output: (B, H, W, 3) in uint8.
    """
    height, width = preprocessing.input_size
    filter, count = preprocessing.interpolation, len(images)
    table = np.empty((count, _FIELDS), np.int64)
    table[:, :GIVEN] = images
    sizes = images[:, [WIDTH, HEIGHT]].tolist()
    table[:, GIVEN:-2] = [_place(*size, preprocessing) for size in sizes]
    lines = table[:, -3]
    pixels, narrow = lines * images[:, WIDTH] * 3, lines * (width * 3)
    table[:, -2], table[:, -1] = pixels.cumsum() - pixels, narrow.cumsum() - narrow
    stride = 1 + int(table[:, GIVEN + 4 : GIVEN + 6].max())

    empty, device = torch.empty, batch.device
    on_device = torch.from_numpy(table).to(device)
    weights = empty(count * (width + height) * stride, dtype=torch.int32, device=device)
    as_pixels = empty(int(pixels.sum()), dtype=torch.uint8, device=device)
    as_narrow = empty(int(narrow.sum()), dtype=torch.uint8, device=device)
    half = FILTERS[filter][0] if filter in FILTERS else 0.5
    size = (_FIELDS, width, height)
    grid = (ceil_div(max(width, height), _OUTPUTS), 2, count)
    _launch_weigh(grid, (on_device, weights), (stride,), (*size, half, filter, _OUTPUTS), num_warps=2)
    grid = (ceil_div(int(pixels.max()) // 3, _PIXELS), count, 1)
    _launch_convert(grid, (on_device, as_pixels), (), (_FIELDS, _PIXELS), num_warps=4)
    grid = (ceil_div(int(lines.max()) * width, _PIXELS), count, 1)
    _launch_across(grid, (on_device, weights, as_pixels, as_narrow), (stride, width, height), (_FIELDS, _PIXELS), 4)
    grid = (ceil_div(height, _ROWS), ceil_div(width * 3, _BYTES), count)
    _launch_down(grid, (on_device, weights, as_narrow, batch), (stride,), (*size, _ROWS, _BYTES), num_warps=4)


class _Unfused:
    """A kernel without fused multiply-add."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return partial(self._function[grid], enable_fp_fusion=False)


_launch_weigh, _launch_convert = Kernel(_Unfused(_weigh)), Kernel(_convert)
_launch_across, _launch_down = Kernel(_across), Kernel(_down)


@lru_cache(1 << 14)
def _place(width: int, height: int, preprocessing: Preprocessing) -> Sequence[int]:
    """The values that follow from an image's size."""
    sides = axes(width, height, preprocessing)
    half = FILTERS[preprocessing.interpolation][0] if preprocessing.interpolation in FILTERS else 0.0
    taps = [math.ceil(half * max(side.size / side.resized, 1.0)) * 2 + 1 for side in sides]
    x, y = sides
    return (x.resized, y.resized, x.start, y.start, *taps, y.low, y.high - y.low)
