"""What the search measures on real models and photos: distances, intervals, and latencies that follow a line."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from server.calibration import photos
from server.calibration.latency import Latency, measure
from server.calibration.photos import Calibration, read_photos
from server.device.models import LoadedModel, load_model
from server.device.runner import Runner
from server.dial import Schedule
from server.images.photos import choose_photos
from server.intervals import paired_difference, wilson
from server.settings import ModelSpec, SettingsError
from tests.server.conftest import encode, model_info

PIXELS = 1_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures of noise, one of them in a folder below, beside a file that is none."""
    (tmp_path / "below").mkdir()
    torch.manual_seed(0)
    for index in range(12):
        noise = Image.frombytes("RGB", (40, 36), bytes(torch.randint(256, (40 * 36 * 3,)).tolist()))
        (tmp_path / ("below" if index == 0 else ".") / f"{index:02}.PNG").write_bytes(encode(noise))
    (tmp_path / "labels.csv").write_text("file,label\n")
    return tmp_path


@pytest.fixture
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(ModelSpec.model_validate({"source": f"local-dir:{tiny_folder}"}))


def photos_of(loaded: LoadedModel, folder: Path, count: int = 100, seed: int = 0) -> list[bytes]:
    return read_photos(choose_photos(folder, count, seed), loaded.info, PIXELS)


def calibration(loaded: LoadedModel, folder: Path, batch_size: int = 5) -> Calibration:
    runner = Runner({loaded.info.name: loaded}, "cpu", "fp32")
    return Calibration(runner, loaded, photos_of(loaded, folder), batch_size)


def test_photos_come_in_an_order_that_the_seed_decides(loaded: LoadedModel, folder: Path) -> None:
    orders = [photos_of(loaded, folder, seed=seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) and len(set(orders[0])) == 12


def test_no_more_photos_are_read_than_asked_for(loaded: LoadedModel, folder: Path) -> None:
    assert len(photos_of(loaded, folder, 7)) == 7


@pytest.mark.parametrize("name", ["nothing", "below"])
def test_a_folder_of_fewer_than_two_photos_is_refused(name: str, loaded: LoadedModel, folder: Path) -> None:
    with pytest.raises(SettingsError, match=rf"{name} holds [01] images; at least 2"):
        choose_photos(folder / name, 100, seed=0)


def test_a_broken_photo_is_named(loaded: LoadedModel, folder: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(SettingsError, match="broken.jpg"):
        photos_of(loaded, folder)


def test_probabilities_are_those_of_the_chosen_photos_whatever_the_batch(loaded: LoadedModel, folder: Path) -> None:
    one, many = calibration(loaded, folder, 1), calibration(loaded, folder, 12)
    chosen = [7, 2, 11, 3, 5, 0]
    torch.testing.assert_close(one.probabilities((4, 2), chosen), many.probabilities((4, 2), range(12))[chosen])


def test_at_r_0_nothing_differs(loaded: LoadedModel, folder: Path) -> None:
    at_hand = calibration(loaded, folder)
    assert at_hand.distance((0, 0), range(12)) == pytest.approx(0, abs=1e-3)
    assert at_hand.agreements((0, 0), range(12)) == [True] * 12


def test_the_distance_is_that_of_the_roots_of_probabilities(loaded: LoadedModel, folder: Path) -> None:
    at_hand = calibration(loaded, folder)
    merged, unmerged = (at_hand.probabilities(r, [1, 4]).sqrt() for r in ((8, 4), (0, 0)))
    expected = float(((merged - unmerged).square().sum(dim=1) / 2).sqrt().mean())
    assert at_hand.distance((8, 4), [1, 4]) == pytest.approx(expected, rel=1e-2)
    assert expected > 1e-4


def test_agreement_is_that_of_the_likeliest_class(loaded: LoadedModel, folder: Path) -> None:
    at_hand = calibration(loaded, folder)
    classes = [at_hand.probabilities(r, range(12)).argmax(dim=1) for r in ((8, 4), (0, 0))]
    assert at_hand.agreements((8, 4), range(12)) == (classes[0] == classes[1]).tolist()


def test_a_batch_takes_time_with_merging_and_in_timm(loaded: LoadedModel, folder: Path) -> None:
    at_hand = calibration(loaded, folder)
    assert at_hand.seconds((4, 2)) > 0 and at_hand.seconds(None) > 0


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (95, 100, 0.8882, 0.9785)]
)
def test_wilson_gives_published_intervals(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits, count) == pytest.approx((low, high), abs=1e-4)


def test_a_paired_difference_holds_the_truth_as_often_as_it_says() -> None:
    random_numbers, held, tries = random.Random(0), 0, 400
    for _ in range(tries):
        ours = [random_numbers.random() < 0.9 for _ in range(200)]
        theirs = [our if random_numbers.random() < 0.8 else random_numbers.random() < 0.8 for our in ours]
        difference, low, high = paired_difference(ours, theirs)
        assert low <= difference <= high
        held += low <= 0.02 <= high  # 0.2 * (0.9 - 0.8)
    assert 0.92 <= held / tries <= 0.98


def test_a_paired_difference_counts_the_photos_on_which_one_alone_holds() -> None:
    ours = [True] * 60 + [False] * 40
    theirs = [True] * 50 + [False] * 10 + [True] * 4 + [False] * 36
    difference, low, high = paired_difference(ours, theirs)
    assert difference == pytest.approx(0.06)  # 10 won, 4 lost
    centre, half_width = 6 / 102, 1.96 * ((15 - 36 / 102) ** 0.5) / 102
    assert (low, high) == pytest.approx((centre - half_width, centre + half_width), rel=1e-4)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_a_paired_difference_lies_in_its_interval_and_turns_round(photos: list[tuple[bool, bool]]) -> None:
    ours, theirs = zip(*photos, strict=True)
    difference, low, high = paired_difference(ours, theirs)
    assert difference == pytest.approx((sum(ours) - sum(theirs)) / len(ours))
    assert low < high
    assert paired_difference(theirs, ours) == pytest.approx((-difference, -high, -low))


def test_photos_that_agree_anyway_make_a_paired_difference_sure() -> None:
    same, low, high = paired_difference([True] * 500, [True] * 500)
    assert same == 0 and -0.01 < low < 0 < high < 0.01
    difference, low, high = paired_difference([True] * 300, [True] * 150 + [False] * 150)
    assert difference == 0.5 and 0.42 < low < 0.5 < high < 0.58


def fake_seconds(schedule: Schedule) -> float:
    """A device on which a token costs 1 ms, a pair of them 10 us, a token in the MLP 2 ms, and merging 5 ms."""
    counts = model_info(num_tokens=65, max_r=32, num_blocks=6).token_counts(schedule)
    merging = sum(before > after for before, after in zip(counts, counts[1:], strict=False))
    return 0.02 + sum(1e-3 * n + 1e-5 * n * n for n in counts[:-1]) + sum(2e-3 * n for n in counts[1:]) + 5e-3 * merging


def test_latencies_that_follow_the_line_are_predicted() -> None:
    latency = Latency(fake_seconds, model_info(num_tokens=65, max_r=32, num_blocks=6))
    assert latency.error < 1e-6
    for schedule in [(0,) * 6, (0, 30, 0, 0, 10, 0), (3, 1, 4, 1, 5, 9)]:
        assert latency(schedule) == pytest.approx(fake_seconds(schedule), rel=1e-6)


def test_one_slow_run_does_not_spoil_a_latency() -> None:
    calls: list[Schedule] = []

    def seconds(schedule: Schedule) -> float:
        calls.append(schedule)
        return 100.0 if len(calls) in (3, 5) else sum(schedule) / 10  # a stall, and the warm-up is slow too

    assert measure(seconds, [(1, 2), (4, 0)]) == {(1, 2): 0.3, (4, 0): 0.4}
    assert calls[:4] == [(1, 2), (4, 0)] * 2  # in turns


def test_as_many_photos_are_decoded_at_once_as_there_are_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Threads(ThreadPoolExecutor):
        def __init__(self, most: int | None = None) -> None:
            asked.append(most or 0)
            super().__init__(most)

    monkeypatch.setattr(photos, "available_cpus", lambda: 3)
    monkeypatch.setattr(photos, "ThreadPoolExecutor", Threads)
    Image.new("RGB", (9, 9)).save(tmp_path / "photo.png")
    assert len(read_photos([tmp_path / "photo.png"], model_info(), PIXELS)) == 1
    assert asked == [3]
