"""Random views: of the photo's own colours, half of them mirrored, of any size, mixed in the same range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tome_core.views import cropped, mixed, views

SIDES = st.integers(1, 40)
SEEDS = st.integers(0, 10_000)
ROUNDING = 1e-5


def photos(seed: int, count: int, height: int, width: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.rand(count, 3, height, width)


def stays_within(found: Tensor, source: Tensor) -> bool:
    return bool(found.min() >= source.min() - ROUNDING) and bool(found.max() <= source.max() + ROUNDING)


@given(SEEDS, st.integers(1, 4), SIDES, SIDES, SIDES, SIDES)
@settings(max_examples=50)
def test_a_crop_is_made_of_the_colours_of_its_own_photo(
    seed: int, count: int, height: int, width: int, to_height: int, to_width: int
) -> None:
    source = photos(seed, count, height, width)
    found = cropped(source, (to_height, to_width))
    assert found.shape == (count, 3, to_height, to_width)
    for one, view in zip(source, found, strict=True):
        for channel in range(3):
            assert stays_within(view[channel], one[channel])


@given(SEEDS, st.floats(0, 1), SIDES, SIDES)
@settings(max_examples=50)
def test_a_photo_of_one_colour_stays_it(seed: int, colour: float, height: int, width: int) -> None:
    torch.manual_seed(seed)
    found = cropped(torch.full((3, 3, height, width), colour), (9, 7))
    torch.testing.assert_close(found, torch.full((3, 3, 9, 7), colour))


def test_half_are_mirrored_and_none_upside_down() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 32)
    to_the_right = ramp.expand(400, 3, 32, 32)
    found = cropped(to_the_right, (8, 8))
    mirrored = int((found[:, 0, 0, -1] < found[:, 0, 0, 0]).sum())
    assert 150 < mirrored < 250
    downwards = cropped(to_the_right.transpose(2, 3), (8, 8))
    assert bool((downwards[:, 0, -1, 0] > downwards[:, 0, 0, 0]).all())


def test_crops_show_a_third_of_the_photo_up_to_all_of_it() -> None:
    torch.manual_seed(0)
    rows = torch.linspace(0, 1, 64).view(64, 1).expand(2000, 3, 64, 64)
    found = cropped(rows, (16, 16))[:, 0, :, 0]
    shown = (found[:, -1] - found[:, 0]) * 16 / 15 * 63 / 64  # the middles of its first row and its last
    areas = shown.square()
    assert areas.min() == pytest.approx(0.35, abs=0.02) and areas.max() == pytest.approx(1, abs=0.04)
    assert areas.mean() == pytest.approx(0.675, abs=0.02)
    middles = found.mean(dim=1)
    assert middles.min() < 0.35 and middles.max() > 0.65 and middles.mean() == pytest.approx(0.5, abs=0.02)


@given(SEEDS, st.integers(1, 6), SIDES, SIDES)
def test_mixing_keeps_shape_range_and_light(seed: int, count: int, height: int, width: int) -> None:
    source = photos(seed, count, height, width)
    kept = source.clone()
    found = mixed(source)
    assert found.shape == source.shape and stays_within(found, source)
    assert torch.equal(source, kept)
    # What an image loses, its neighbour gets: the sum over the batch stays.
    torch.testing.assert_close(found.sum(dim=0), source.sum(dim=0), rtol=1e-4, atol=1e-4)


def test_mixing_blends_some_batches_and_cuts_others() -> None:
    torch.manual_seed(0)
    source = torch.stack([torch.zeros(3, 16, 12), torch.ones(3, 16, 12)])
    found = [mixed(source)[0] for _ in range(200)]
    blended = [each for each in found if len(each.unique()) == 1 and 0 < each.unique() < 1]
    cut = [each for each in found if len(each.unique()) == 2]
    assert 50 < len(blended) < 150 and 50 < len(cut) < 150
    assert all(set(each.unique().tolist()) == {0.0, 1.0} for each in cut)
    areas = torch.stack([each.mean() for each in cut])
    assert areas.min() < 0.1 and areas.max() > 0.8 and areas.mean() == pytest.approx(4 / 9, abs=0.1)


@pytest.mark.parametrize("mix", [True, False])
@pytest.mark.parametrize(("count", "of"), [(7, 3), (3, 3), (2, 5), (1, 1)])
def test_views_come_of_every_photo_alike(mix: bool, count: int, of: int) -> None:
    source = torch.arange(of, dtype=torch.uint8).view(of, 1, 1, 1).expand(of, 3, 10, 14) * 50
    found = views(source, (6, 8), count, mix)
    assert found.shape == (count, 3, 6, 8) and found.dtype == torch.float32
    assert stays_within(found, source / 255)
    if not mix:
        seen = (found.mean(dim=(1, 2, 3)) * 255 / 50).round().long().bincount(minlength=of)
        assert seen.max() - seen.min() <= 1


def test_the_seed_decides_everything() -> None:
    source = torch.randint(256, (5, 3, 12, 12), dtype=torch.uint8)

    def made(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return views(source, (8, 8), 6, mix=True)

    assert torch.equal(made(1), made(1)) and not torch.equal(made(1), made(2))
