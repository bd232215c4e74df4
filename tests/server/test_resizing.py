"""Resizing on the device: the pixels of `images.pillow`, which are Pillow's, for images of many sizes together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from server.images import resizing
from server.images.pillow import decode
from server.images.preprocessing import Preprocessing
from server.images.resizing import resize
from tests.server.conftest import encode

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
HALF = (0.5, 0.5, 0.5)
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def noise(width: int, height: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_pillow(pixels: Pixels, wants: Preprocessing) -> Pixels:
    """By Pillow, across and then down whatever it would do itself, and by `decode` for the crop."""
    image, method = Image.fromarray(pixels), Image.Resampling[wants.interpolation.upper()]
    width, height = wants.resized(*image.size)
    return by_decode(np.asarray(image.resize((width, image.height), method).resize((width, height), method)), wants)


def by_decode(pixels: Pixels, wants: Preprocessing) -> Pixels:
    rows = decode(encode(Image.fromarray(pixels), "BMP"), wants, 10_000_000)
    return np.frombuffer(rows, np.uint8).reshape(*wants.input_size, 3)


def by_us(images: list[Pixels], wants: Preprocessing) -> list[Pixels]:
    resized = resize([torch.from_numpy(each.copy()).permute(2, 0, 1) for each in images], wants)
    assert resized.dtype == torch.uint8 and resized.is_contiguous()
    return list(resized.numpy())


def test_halves_go_up_and_what_overshoots_is_clamped_as_in_pillow() -> None:
    stripes = np.repeat(np.array([[0, 1, 254, 255]], np.uint8).T.repeat(8, 1)[..., None], 3, axis=2)
    halved = Preprocessing((2, 2), (2, 2), "squash", "box", HALF, HALF)
    assert by_us([stripes], halved)[0][:, 0, 0].tolist() == by_decode(stripes, halved)[:, 0, 0].tolist() == [1, 255]
    edge = np.zeros((16, 16, 3), np.uint8)
    edge[:, 8:] = 255
    enlarged = Preprocessing((40, 40), (40, 40), "squash", "lanczos", HALF, HALF)
    got = by_us([edge], enlarged)[0]
    assert np.array_equal(got, by_decode(edge, enlarged)) and {0, 255} < set(got.flat)


def any_tie(size: tuple[int, int], resized: tuple[int, int]) -> bool:
    return any(
        (2 * output + 1) * before % (2 * after) == 0
        for before, after in zip(size, resized, strict=True)
        for output in range(after)
    )


sizes = st.tuples(st.integers(1, 160), st.integers(1, 160)).filter(lambda size: max(size) <= 12 * min(size))


@settings(max_examples=150)
@given(
    images=st.lists(sizes, min_size=1, max_size=5),
    input_size=st.sampled_from([(16, 16), (17, 17), (32, 32), (24, 32)]),
    larger=st.sampled_from([0.8, 1.0, 1 / 0.95, 1 / 0.9, 1 / 0.875]),
    crop=st.sampled_from(("center", "squash")),
    interpolation=st.sampled_from(INTERPOLATIONS),
)
@example([(500, 375), (375, 500), (32, 32), (1, 9), (9, 1)], (32, 32), 1 / 0.9, "center", "bicubic")
@example([(64, 64), (96, 64), (33, 32)], (32, 32), 1.0, "squash", "box")
def test_it_is_pillow_but_for_roundings(
    images: list[tuple[int, int]], input_size: tuple[int, int], larger: float, crop: Any, interpolation: Any
) -> None:
    height, width = (int(side * larger) for side in input_size)
    wants = Preprocessing(input_size, (height, width), crop, interpolation, HALF, HALF)
    if interpolation == "nearest":  # the middle of a pixel on the edge of two: Pillow adds up to it, and so misses it
        assume(not any(any_tie(size, wants.resized(*size)) for size in images))
    files = [noise(*size, seed=index) for index, size in enumerate(images)]
    for file, got in zip(files, by_us(files, wants), strict=True):
        off = np.abs(got.astype(int) - by_pillow(file, wants))
        # Exact halves are rounded either way: many, where a small image becomes a slightly larger one.
        assert off.max() <= 2 and (off > 1).mean() <= 0.02 and (off > 0).mean() <= 0.2


def smooth(width: int, height: int) -> Pixels:
    """Without the harsh edges of noise, as a photo is."""
    return np.asarray(Image.fromarray(noise(80, 60)).resize((width, height), Image.Resampling.BICUBIC))


def test_a_photo_of_many_megapixels_is_pillows_too() -> None:
    wants = Preprocessing((224, 224), (248, 248), "center", "bicubic", HALF, HALF)
    photo = smooth(2400, 1800)
    off = np.abs(by_us([photo], wants)[0].astype(int) - by_decode(photo, wants))
    assert off.max() <= 1 and (off > 0).mean() <= 0.001


@pytest.mark.parametrize("crop", ["center", "squash"])
@pytest.mark.parametrize("interpolation", [each for each in INTERPOLATIONS if each != "nearest"])
def test_photos_are_as_decode_makes_them_nearly_everywhere(crop: Any, interpolation: Any) -> None:
    wants = Preprocessing((224, 224), (248, 248), crop, interpolation, HALF, HALF)
    photos = [smooth(*size) for size in [(500, 375), (375, 500), (299, 299), (640, 427)]]
    for photo, got in zip(photos, by_us(photos, wants), strict=True):
        off = np.abs(got.astype(int) - by_decode(photo, wants))
        assert (off > 1).mean() <= 0.0001 and (off > 0).mean() <= 0.05


@settings(max_examples=50)
@given(images=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=40))
def test_groups_hold_every_image_once_and_neither_much_padding_nor_much_at_once(images: list[tuple[int, int]]) -> None:
    groups = list(resizing._groups(images))
    assert sorted(index for group in groups for index in group) == list(range(len(images)))
    for group in groups:
        area = len(group) * math.prod(max(images[index][axis] for index in group) for axis in (0, 1))
        assert area <= resizing.MOST_PADDING * sum(math.prod(images[index]) for index in group)
        assert len(group) == 1 or area <= resizing.GROUP_PIXELS


def test_usual_photos_landscape_and_portrait_are_one_group() -> None:
    assert len(list(resizing._groups([(500, 375), (375, 500), (480, 360), (500, 333)] * 16))) == 1
