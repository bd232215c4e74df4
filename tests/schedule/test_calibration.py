"""What the search asks of a real model: how far its answers are from those at r=0, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.schedule_parts.calibration import Calibration
from server.calibration.photos import read_photos
from server.device.models import load_model
from server.device.runner import Runner
from server.images.photos import choose_photos
from server.model_spec import ModelSpec

Make = Callable[..., Calibration]
COUNT, UNMERGED, LIGHT, HEAVY = 12, (0, 0, 0, 0), (4, 2, 0, 0), (32, 16, 8, 0)


@pytest.fixture
def calibration(model: str, photos: Path) -> Make:
    """Makes one of twelve photos: `calibration(batch_size)`."""
    loaded = load_model(ModelSpec.model_validate({"source": model}))
    pixels = read_photos(choose_photos(photos, COUNT, seed=0), loaded.info, max_pixels=1_000_000)
    runner = Runner({loaded.info.name: loaded}, "cpu", "fp32")
    return lambda batch_size=5: Calibration(runner, loaded, pixels, batch_size)


def test_probabilities_are_those_of_the_chosen_photos_whatever_the_batch(
    calibration: Make,
) -> None:
    one, many = calibration(1), calibration(COUNT)
    chosen = [7, 2, 11, 3, 5, 0]
    torch.testing.assert_close(one.probabilities(LIGHT, chosen), many.probabilities(LIGHT, range(COUNT))[chosen])


def test_at_r_0_nothing_differs(calibration: Make) -> None:
    at_hand = calibration()
    assert at_hand.distance(UNMERGED, range(COUNT)) == pytest.approx(0, abs=1e-3)
    assert at_hand.agreements(UNMERGED, range(COUNT)) == [True] * COUNT


def test_the_distance_is_that_of_the_roots_of_probabilities(calibration: Make) -> None:
    at_hand = calibration()
    merged, unmerged = (at_hand.probabilities(r, [1, 4]).sqrt() for r in (HEAVY, UNMERGED))
    expected = float(((merged - unmerged).square().sum(dim=1) / 2).sqrt().mean())
    assert at_hand.distance(HEAVY, [1, 4]) == pytest.approx(expected, rel=1e-2)
    assert expected > 1e-4


def test_agreement_is_that_of_the_likeliest_class(calibration: Make) -> None:
    at_hand = calibration()
    classes = [at_hand.probabilities(r, range(COUNT)).argmax(dim=1) for r in (HEAVY, UNMERGED)]
    agreed = at_hand.agreements(HEAVY, range(COUNT))
    assert agreed == (classes[0] == classes[1]).tolist()
    assert set(agreed) == {True, False}


def test_a_batch_takes_time_with_merging_and_in_timm(calibration: Make) -> None:
    at_hand = calibration()
    assert at_hand.seconds(LIGHT) > 0 and at_hand.seconds(None) > 0
