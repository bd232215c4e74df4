"""The kernels that make a model's pixels of a JPEG's planes: byte for byte Pillow's. A CPU interprets them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from server.images import resize_kernel as table
from server.images.image import JpegFile
from server.images.nvjpeg_planes import is_known, laid_out
from server.images.preprocessing import Preprocessing
from server.images.resizing import resize
from tests.server.conftest import encode
from tests.server.test_resizing import by_pillow

HALF = (0.5, 0.5, 0.5)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Bytes = NDArray[np.uint8]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """With edges and colours, and not as harsh as noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def wanted(
    input_size: tuple[int, int] = (10, 10),
    resize_size: tuple[int, int] = (11, 11),
    crop: Any = "center",
    interpolation: Any = "bicubic",
) -> Preprocessing:
    return Preprocessing(input_size, resize_size, crop, interpolation, HALF, HALF)


@dataclass
class Planes:
    """Luminance and two colours as they lie in a file, and the pixels that libjpeg makes of them."""

    planes: list[Bytes]
    file: bytes


def opened(file: bytes, shrink: int = 1) -> Bytes:
    """By libjpeg, not converted. Shrunk, the colours are as in the file, where they are half as wide and high there."""
    image = Image.open(io.BytesIO(file))
    image.draft("YCbCr", (image.width // shrink, image.height // shrink))
    return np.asarray(image)


def halved(width: int, height: int, seed: int = 0) -> Planes:
    file = encode(photo(width, height, seed), "JPEG", quality=92, subsampling=2)
    colours = opened(file, 2)
    return Planes([opened(file)[..., 0], colours[..., 1], colours[..., 2]], file)


def whole(width: int, height: int, seed: int = 0) -> Planes:
    file = encode(photo(width, height, seed), "JPEG", quality=92, subsampling=0)
    return Planes(list(np.moveaxis(opened(file), 2, 0)), file)


def grey(width: int, height: int, seed: int = 0) -> Planes:
    file = encode(photo(width, height, seed).convert("L"), "JPEG", quality=92)
    return Planes([opened(file)], file)


def by_kernels(images: Sequence[Sequence[Bytes]], wants: Preprocessing, rows: Sequence[int] | None = None) -> Bytes:
    """Planes laid out as nvJPEG's are, and the batch that the kernels make of them; untouched rows are 77."""
    sizes = np.zeros((len(images), 2, 4), np.int32)
    for size, planes in zip(sizes, images, strict=True):
        size[0, : len(planes)] = [plane.shape[1] for plane in planes]
        size[1, : len(planes)] = [plane.shape[0] for plane in planes]
    facts, length = laid_out(sizes)
    memory = np.full(length, 123, np.uint8)
    for image, planes in zip(facts, images, strict=True):
        starts = image[table.LUMA : table.CR + 1]
        for start, plane, line in zip(starts, planes, image[[table.LINE, *[table.COLOUR_LINE] * 2]], strict=False):
            into = memory[start : start + line * plane.shape[0]].reshape(-1, line)
            assert (into == 123).all()
            into[:, : plane.shape[1]] = plane
    on_device = torch.from_numpy(memory).to(DEVICE)
    facts[:, table.LUMA : table.CR + 1] += on_device.data_ptr()
    facts[:, table.ROW] = range(len(images)) if rows is None else rows
    batch = torch.full((1 + facts[:, table.ROW].max(), *wants.input_size, 3), 77, dtype=torch.uint8, device=DEVICE)
    table.resize(facts, wants, batch)
    made: Bytes = batch.cpu().numpy()
    return made


def by_libjpeg(file: bytes) -> Bytes:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


@pytest.mark.parametrize("make", [halved, whole, grey])
@pytest.mark.parametrize(("width", "height"), [(24, 18), (13, 9), (5, 20), (31, 3)])
def test_pixels_are_libjpegs(make: Any, width: int, height: int) -> None:
    """Of an image that already has the size."""
    made = make(width, height)
    wants = wanted((height, width), (height, width), "squash")
    assert np.array_equal(by_kernels([made.planes], wants)[0], by_libjpeg(made.file))


def enlarged(plane: Bytes, axis: int) -> Bytes:
    """To twice as many, as libjpeg does where the other axis is whole: three parts of the nearest, one of the next."""
    values = np.moveaxis(plane.astype(int), axis, 0)
    before, behind = np.concatenate([values[:1], values[:-1]]), np.concatenate([values[1:], values[-1:]])
    both = np.stack([3 * values + before + 1, 3 * values + behind + 2], 1) >> 2
    return np.moveaxis(both.reshape(-1, *values.shape[1:]), 0, axis).astype(np.uint8)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [24, 23])
def test_colours_that_are_halved_along_one_axis(axis: int, size: int) -> None:
    """No tool here shows the planes of such a file; one whose colours are whole must give the same."""
    planes = whole(size, size).planes
    small = [np.ascontiguousarray(plane[::2] if axis == 0 else plane[:, ::2]) for plane in planes[1:]]
    full = [enlarged(plane, axis)[:size, :size] for plane in small]
    wants = wanted((size, size), (size, size), "squash")
    halves, wholes = by_kernels([[planes[0], *small], [planes[0], *full]], wants)
    assert np.array_equal(halves, wholes)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_resized_pixels_are_pillows(interpolation: Any) -> None:
    """Shrunk, enlarged, cropped, and set into black where they are smaller than the crop."""
    made = [halved(24, 18), grey(9, 15, 1), whole(7, 6, 2)]
    for wants in (wanted((10, 9), (10, 9), "squash", interpolation), wanted((8, 12), (7, 7), "center", interpolation)):
        got = by_kernels([each.planes for each in made], wants)
        for each, image in zip(made, got, strict=True):
            off = np.abs(image.astype(int) - by_pillow(by_libjpeg(each.file), wants))
            # The nearest of two equally near pixels is another where Pillow adds up to the middle between them.
            assert (off > 0).mean() <= (0.15 if interpolation == "nearest" else 0)


def test_a_large_image_beside_small_ones() -> None:
    made = [halved(20, 20), halved(120, 91, 1), grey(18, 40, 2)]
    wants = wanted((8, 8), (8, 8), interpolation="bilinear")
    got = by_kernels([each.planes for each in made], wants)
    for each, image in zip(made, got, strict=True):
        assert np.array_equal(image, by_pillow(by_libjpeg(each.file), wants))


def test_images_go_where_they_belong() -> None:
    made = [halved(20, 20, seed) for seed in range(3)]
    wants = wanted()
    got = by_kernels([each.planes for each in made], wants, rows=[4, 0, 2])
    for row, each in zip((4, 0, 2), made, strict=True):
        assert np.array_equal(got[row], by_pillow(by_libjpeg(each.file), wants))
    assert (got[[1, 3]] == 77).all()


def test_what_nvjpeg_may_have_that_the_kernels_do_not_know() -> None:
    sizes = np.array(
        [
            [[40, 20, 20, 0], [30, 15, 15, 0]],
            [[41, 21, 21, 0], [31, 16, 16, 0]],
            [[41, 41, 41, 0], [31, 16, 16, 0]],
            [[40, 0, 0, 0], [30, 0, 0, 0]],
            [[40, 10, 10, 0], [30, 30, 30, 0]],  # a quarter as wide
            [[40, 20, 40, 0], [30, 15, 30, 0]],  # colours of two sizes
            [[40, 40, 40, 40], [30, 30, 30, 30]],  # four colours
            [[4, 2, 2, 0], [30, 15, 15, 0]],  # libjpeg does not interpolate so few
            [[40, 20, 20, 0], [1, 1, 1, 0]],
            [[0, 0, 0, 0], [0, 0, 0, 0]],  # refused
            [[44, 22, 22, 0], [30, 15, 15, 0]],  # not as told
        ],
        np.int32,
    )
    told = [(int(each[0, 0]), int(each[1, 0])) for each in sizes]
    told[-2:] = [(40, 30), (40, 30)]
    assert is_known(sizes, told).tolist() == [True] * 4 + [False] * 7


@pytest.mark.gpu
@pytest.mark.parametrize("interpolation", [each for each in INTERPOLATIONS if each != "nearest"])
def test_on_a_gpu_they_are_the_reference(interpolation: Any) -> None:
    wants = wanted((224, 224), (248, 248), "center", interpolation)
    made = [halved(299, 299), whole(500, 375, 1), grey(120, 333, 2), halved(2000, 1500, 3)]
    got = torch.from_numpy(by_kernels([each.planes for each in made], wants)).int()
    pixels = [torch.from_numpy(by_libjpeg(each.file).copy()).permute(2, 0, 1).to(DEVICE) for each in made]
    off = (got - resize(pixels, wants).cpu().int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() <= 0.01


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *[("RGB", {"subsampling": each}) for each in (0, 1, 2)],
        ("RGB", {"progressive": True}),
        ("L", {}),
        ("L", {"progressive": True}),
    ],
)
def test_on_a_gpu_files_are_decoded_as_by_pillow(mode: str, options: dict[str, Any]) -> None:
    from server.images.nvjpeg import decoder_on

    wants = wanted((224, 224), (248, 248))
    sizes = [(299, 299), (500, 375), (375, 501), (33, 64), (1200, 799)] * 8
    files = [encode(photo(*size, seed).convert(mode), "JPEG", **options) for seed, size in enumerate(sizes)]
    batch = torch.zeros(len(files), 224, 224, 3, dtype=torch.uint8, device=DEVICE)
    with torch.cuda.stream(torch.cuda.Stream()):
        decode_on_gpu = decoder_on(torch.device("cuda", torch.cuda.current_device()))
        told = [JpegFile(file, *size) for file, size in zip(files, sizes, strict=True)]
        assert decode_on_gpu(told, wants, batch, range(len(files))) == []
        torch.cuda.current_stream().synchronize()
    for file, image in zip(files, batch.cpu().numpy(), strict=True):
        off = np.abs(image.astype(int) - by_pillow(by_libjpeg(file), wants))
        assert off.max() <= (4 if "progressive" in options else 0)  # those are not for the GPU's decoding engine
