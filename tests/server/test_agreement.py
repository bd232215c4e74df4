"""What an `r` has in common with r=0: classes, sets of labels, and neighbours, against the plainest way to count."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.calibration import agreement
from server.calibration.agreement import answers, default_for, judge, nearest
from server.curve import AgreementOf
from server.device.outcome import Found, Wanted, gathered
from server.intervals import of_mean, wilson
from tests.server.conftest import model_info

SEEDS = st.integers(0, 2**31)


def vectors(seed: int, count: int) -> Tensor:
    """In double precision, in which two photos are hardly ever equally near."""
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def ranked(query: int, queries: Tensor, index: Tensor, k: int) -> list[int]:
    others = [photo for photo in range(len(index)) if photo != query]
    return sorted(others, key=lambda photo: -cosine(queries[query], index[photo]))[:k]


@given(SEEDS, st.integers(2, 20), st.data())
def test_the_nearest_are_the_nearest_by_cosine_and_never_the_photo_itself(
    seed: int, count: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, count - 1))
    queries, index = vectors(seed, count), vectors(seed + 1, count)
    for photo, found in enumerate(nearest(queries, index, k).tolist()):
        assert found == ranked(photo, queries, index, k)


def test_many_photos_are_compared_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = nearest(vectors(0, 20), vectors(1, 20), 4)
    monkeypatch.setattr(agreement, "_ROWS", 7)
    assert torch.equal(nearest(vectors(0, 20), vectors(1, 20), 4), whole)


@given(SEEDS, st.integers(11, 25), st.floats(0, 1))
def test_neighbours_are_counted_photo_by_photo(seed: int, count: int, noise: float) -> None:
    unmerged = vectors(seed, count)
    at_r = unmerged + noise * vectors(seed + 1, count)
    queried, same = 0, 0
    for photo in range(count):
        wanted = set(ranked(photo, unmerged, unmerged, 10))
        queried += len(wanted & set(ranked(photo, at_r, unmerged, 10)))
        same += len(wanted & set(ranked(photo, at_r, at_r, 10)))
    judged = judge("neighbours", at_r, unmerged)
    assert judged.neighbours is not None
    assert judged.agreement == pytest.approx(queried / (10 * count))
    assert judged.neighbours.same_index == pytest.approx(same / (10 * count))
    mean = sum(cosine(at_r[photo], unmerged[photo]) for photo in range(count)) / count
    assert judged.neighbours.cosine == pytest.approx(mean, abs=1e-6)
    assert judged.interval[0] <= judged.agreement + 1e-9 and judged.agreement <= judged.interval[1] + 1e-9


@given(SEEDS, st.floats(0.1, 10))
def test_the_length_of_a_vector_means_nothing(seed: int, factor: float) -> None:
    judged = judge("neighbours", factor * vectors(seed, 15), vectors(seed, 15))
    assert judged.agreement == 1 and judged.neighbours is not None
    assert judged.neighbours.same_index == 1 and judged.neighbours.cosine == pytest.approx(1)


LOGITS = torch.tensor([[2.0, 1.0, -1.0], [0.1, 0.2, 3.0], [-1.0, -2.0, -3.0]])


def found(logits: Tensor, wanted: Wanted) -> Found:
    return Found(gathered(logits, 3, wanted), 3, wanted)


def test_an_answer_is_the_likeliest_class_or_all_labels_that_hold() -> None:
    assert answers("top1", found(LOGITS, agreement.WANTED["top1"])).tolist() == [[0], [2], [0]]
    labels = answers("labels", found(LOGITS, agreement.WANTED["labels"]))
    assert labels.tolist() == [[True, True, False], [True, True, True], [False, False, False]]


@pytest.mark.parametrize(("of", "hits"), [("top1", 3), ("labels", 1)])
def test_one_label_more_is_another_answer(of: AgreementOf, hits: int) -> None:
    """The second photo loses a label, and the third gains one that was its likeliest before."""
    merged = LOGITS.clone()
    merged[1, 0], merged[2, 0], merged[0, 2] = -0.1, 0.1, -2.0
    at_r, unmerged = (answers(of, found(logits, agreement.WANTED[of])) for logits in (merged, LOGITS))
    judged = judge(of, at_r, unmerged)
    assert judged == (hits / 3, wilson(hits, 3), None)


def test_what_a_model_is_judged_by() -> None:
    assert default_for(model_info()) == "top1"
    assert default_for(model_info(activation="sigmoid")) == "labels"
    assert default_for(model_info(activation="none")) == "top1"
    assert default_for(model_info(labels=(), activation="sigmoid")) == "neighbours"


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=30))
def test_the_interval_of_yes_and_no_is_wilsons(shares: list[float]) -> None:
    assert of_mean(shares) == pytest.approx(wilson(sum(shares), len(shares)))


@given(st.lists(st.integers(0, 10).map(lambda tenth: tenth / 10), min_size=2, max_size=30))
def test_shares_that_vary_less_are_surer(shares: list[float]) -> None:
    low, high = of_mean(shares)
    mean = math.fsum(shares) / len(shares)
    widest = wilson(mean * len(shares), len(shares))
    assert 0 <= low <= mean + 1e-9 and mean - 1e-9 <= high <= 1
    assert widest[0] - 1e-9 <= low and high <= widest[1] + 1e-9
