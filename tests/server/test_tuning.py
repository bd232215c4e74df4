"""The parts of `tome-server tune`: the band of `r`, what tuning gives, and a learning that was stopped."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.errors import SettingsError
from server.tuning import bands, unfinished
from server.tuning.judging import BATCH, Judge, gain_of
from server.tuning.learning import Progress
from server.tuning.photos import normalised
from tests.server.conftest import model_info
from tome_core.schedule import max_r
from tome_core.tuning import divergence


def info(blocks: int, tokens: int, prefix: int = 1) -> Any:
    return model_info(
        num_blocks=blocks, num_tokens=tokens, num_prefix_tokens=prefix, max_r=max_r(tokens, prefix), name="mine"
    )


@pytest.mark.parametrize(
    ("model", "band"),
    [
        (info(12, 197), (12, 18)),
        (info(12, 201, 5), (12, 18)),  # registers never merge
        (info(12, 577), (35, 53)),
        (info(1, 197), (98, 98)),  # the one block can merge half of the patches
        (info(2, 17), (6, 8)),
        (info(40, 17), (1, 1)),
        (info(3, 3), (1, 1)),
    ],
)
def test_the_default_band(model: Any, band: bands.Band) -> None:
    assert bands.default(model) == band


@given(st.integers(1, 60), st.integers(0, 5), st.integers(2, 2000))
def test_the_default_band_can_be_asked_for(blocks: int, prefix: int, patches: int) -> None:
    model = info(blocks, prefix + patches, prefix)
    low, high = bands.default(model)
    assert 1 <= low <= high <= model.max_r
    assert bands.parse(f"{low}..{high}", model) == (low, high)


@given(st.integers(1, 98), st.integers(1, 98))
def test_a_band_is_read_as_people_write_it(one: int, other: int) -> None:
    low, high = sorted((one, other))
    for text in (f"{low}..{high}", f" {low} .. {high} "):
        assert bands.parse(text, info(12, 197)) == (low, high)
    assert bands.parse(str(low), info(12, 197)) == (low, low)


@pytest.mark.parametrize(
    "text", ["", "0", "0..4", "5..4", "1..99", "-3", "1.5", "1...3", "..", "3..", "a..b", "٣", "1e1", "1,2", "9" * 30]
)
def test_what_is_no_band_is_said(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--band is '.*; it must be LOW\.\.HIGH, between 1 and 98"):
        bands.parse(text, info(12, 197))


@given(st.text())
def test_any_text_is_a_band_or_said_to_be_none(text: str) -> None:
    try:
        low, high = bands.parse(text, info(12, 197))
    except SettingsError:
        return
    assert 1 <= low <= high <= 98


def test_a_model_that_cannot_merge_is_not_tuned() -> None:
    too_few = pytest.raises(SettingsError, match="mine has too few tokens to merge any")
    with too_few:
        bands.default(info(3, 2))
    with too_few:
        bands.parse("1", info(3, 2))


@given(st.data(), st.integers(1, 4), st.integers(2, 12))
def test_the_gain_is_that_of_a_plain_computation(data: st.DataObject, rungs: int, count: int) -> None:
    row = st.lists(st.booleans(), min_size=count, max_size=count)
    rows = st.lists(row, min_size=rungs, max_size=rungs)
    before, after = data.draw(rows), data.draw(rows)
    gain = gain_of(range(5, 5 + rungs), torch.tensor(before), torch.tensor(after))
    by_photo = [sum(after[i][n] - before[i][n] for i in range(rungs)) / rungs for n in range(count)]
    half = 1.959964 * statistics.stdev(by_photo) / math.sqrt(count)
    assert gain.mean == pytest.approx(statistics.mean(by_photo))
    assert gain.interval == pytest.approx((gain.mean - half, gain.mean + half))
    assert gain.r == list(range(5, 5 + rungs))
    assert gain.before == pytest.approx([sum(row) / count for row in before])
    assert gain.after == pytest.approx([sum(row) / count for row in after])
    assert gain.mean == pytest.approx(statistics.mean(gain.after) - statistics.mean(gain.before))


@pytest.mark.parametrize(
    ("won", "lost", "of", "is_sure"),
    [(0, 0, 20, False), (3, 0, 20, False), (4, 0, 20, True), (0, 9, 20, False), (20, 12, 400, False)],
)
def test_a_gain_is_sure_beyond_its_interval(won: int, lost: int, of: int, is_sure: bool) -> None:
    before = torch.tensor([[False] * won + [True] * (of - won)])
    after = torch.tensor([[True] * won + [False] * lost + [True] * (of - won - lost)])
    assert gain_of([16], before, after).is_sure is is_sure


class Answering:
    """A tuner whose answers are a function of the images and of `r`; tuned, they are nearer to its own at r=0."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def answers(self, images: Tensor, r: int, tuned: bool = True) -> Tensor:
        self.sizes.append(len(images))
        pixels = images.flatten(1)
        return pixels[:, :7] + (0.2 if tuned else 0.05 * r) * pixels[:, 7:14]


def test_the_judge_compares_with_the_models_own_answers_at_r_0() -> None:
    preprocessing, tuner = model_info().preprocessing, Answering()
    photos = torch.randint(256, (BATCH + 11, 3, 8, 8), dtype=torch.uint8)
    images = normalised(photos.float() / 255, preprocessing)
    wanted = tuner.answers(images, 0, tuned=False)
    tuner.sizes.clear()
    judge: Any = Judge(tuner, photos, preprocessing)  # type: ignore[arg-type]
    assert tuner.sizes == [BATCH, 11]
    nats, agreement = judge.glance(16)
    answers = tuner.answers(images, 16)
    kept = (answers.argmax(dim=1) == wanted.argmax(dim=1)).float()
    assert (nats, agreement) == pytest.approx((float(divergence(answers, wanted)), float(kept.mean())))
    gain = judge.gain([0, 16])
    assert gain.before[0] == 1 and gain.after[0] == gain.after[1]
    assert gain.after[1] == pytest.approx(agreement) and gain.before[1] < agreement < 1


PROGRESS = Progress(step=7, seconds=1.5, best=0.25, numbers={"norm.weight": torch.ones(3)}, glances=2, loss=0.5)
STATE = {"number norm.weight": torch.arange(3.0), "step norm.weight": torch.tensor(7.0)}


def test_what_was_kept_is_taken_up(tmp_path: Path) -> None:
    file = tmp_path / "mine.unfinished"
    unfinished.keep(file, "this", {}, Progress())
    unfinished.keep(file, "this", STATE, PROGRESS)
    found = unfinished.take_up(file, "this")
    assert found is not None
    state, progress = found
    assert state.keys() == STATE.keys() and all(torch.equal(state[name], STATE[name]) for name in STATE)
    assert torch.equal(progress.numbers.pop("norm.weight"), torch.ones(3))
    assert vars(progress) == vars(PROGRESS) | {"numbers": {}}
    assert list(tmp_path.iterdir()) == [file]
    unfinished.remove(file)
    unfinished.remove(file)
    assert not list(tmp_path.iterdir())


def test_nothing_is_taken_up_of_another_learning_or_of_none(tmp_path: Path) -> None:
    file = tmp_path / "mine.unfinished"
    assert unfinished.take_up(file, "this") is None
    unfinished.keep(file, "this", STATE, PROGRESS)
    assert unfinished.take_up(file, "that") is None
    assert unfinished.take_up(tmp_path, "this") is None


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_nothing_is_taken_up_of_a_damaged_file(kept: int, tmp_path: Path) -> None:
    file = tmp_path / "mine.unfinished"
    unfinished.keep(file, "this", STATE, PROGRESS)
    file.write_bytes(file.read_bytes()[:kept])
    assert unfinished.take_up(file, "this") is None


@pytest.mark.parametrize("progress", [None, "", "{", "[]", "7", '{"speed": 3}', "[" * 100_000])
def test_nothing_is_taken_up_of_another_version(progress: str | None, tmp_path: Path) -> None:
    file = tmp_path / "mine.unfinished"
    unfinished.keep(file, "this", STATE, PROGRESS)
    said = {"of": "this"} | ({} if progress is None else {"progress": progress})
    save_file(load_file(file), file, said)
    assert unfinished.take_up(file, "this") is None


def test_a_best_that_is_none_yet_is_kept_too(tmp_path: Path) -> None:
    unfinished.keep(tmp_path / "mine", "this", STATE, Progress())
    found = unfinished.take_up(tmp_path / "mine", "this")
    assert found is not None and found[1].best == math.inf and json.dumps(found[1].numbers) == "{}"
