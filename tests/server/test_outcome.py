"""What requests want of one batch's outputs: each image gets what it would get alone, whatever the others want."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.device.outcome import Found, Wanted, gathered, wanted_by
from server.images.image import Pixels
from server.ipc.messages import Classify, Embed, Explain, Item, Score, TopK, Vector
from server.types import Activation
from tests.server.messages import ACTIVATIONS

NUM_CLASSES, NUM_FEATURES = 7, 4
ASKED: dict[str, Any] = {"model": "tiny", "images": [Pixels(b"")], "deadline": 1.0}
TOP_KS = st.integers(1, NUM_CLASSES)

Kind = Classify | Score | Embed | Explain
CLASSIFYING = st.builds(
    lambda top_k, activation: Classify(**ASKED, top_k=top_k, activation=activation), TOP_KS, ACTIVATIONS
)
WITH_THRESHOLD = st.builds(
    lambda threshold: Classify(**ASKED, top_k=NUM_CLASSES, activation="sigmoid", threshold=threshold), st.floats(0, 1)
)
SCORING = st.builds(lambda activation: Score(**ASKED, activation=activation), ACTIVATIONS)
EMBEDDING = st.builds(lambda: Embed(**ASKED))
REQUESTS = CLASSIFYING | WITH_THRESHOLD | SCORING | EMBEDDING
SEEDS = st.integers(0, 2**31)


def outputs_of(seed: int, images: int, num_classes: int = NUM_CLASSES) -> Tensor:
    """Logits and features of a model."""
    return 3 * torch.randn(images, num_classes + NUM_FEATURES, generator=torch.Generator().manual_seed(seed))


def answers(requests: Sequence[Kind], outputs: Tensor, num_classes: int = NUM_CLASSES) -> list[TopK | Vector]:
    """The result of each image, by way of the device."""
    items = [Item(request, 0) for request in requests]
    wanted = wanted_by(items)
    found = Found(gathered(outputs, num_classes, wanted), num_classes, wanted)
    return [found.of(row, item) for row, item in enumerate(items)]


def numbers(answer: TopK | Vector) -> list[float]:
    assert isinstance(answer, Vector)
    return list(struct.unpack(f"<{len(answer.values) // 4}f", answer.values))


def scores_of(logits: Tensor, activation: Activation) -> list[float]:
    """By the book, in double precision."""
    values = logits.tolist()
    if activation == "sigmoid":
        return [1 / (1 + math.exp(-value)) for value in values]
    if activation == "softmax":
        total = sum(math.exp(value) for value in values)
        return [math.exp(value) / total for value in values]
    return values


@given(st.lists(REQUESTS, min_size=1, max_size=8), SEEDS)
def test_each_image_gets_what_it_wants_whatever_the_others_want(requests: list[Kind], seed: int) -> None:
    outputs = outputs_of(seed, len(requests))
    for request, row, answer in zip(requests, outputs, answers(requests, outputs), strict=True):
        logits, features = row[:NUM_CLASSES], row[NUM_CLASSES:]
        if isinstance(request, Embed):
            assert numbers(answer) == features.tolist()
            continue
        scores = scores_of(logits, request.activation)
        if isinstance(request, Score):
            assert numbers(answer) == pytest.approx(scores, rel=1e-5, abs=1e-7)
            continue
        assert isinstance(answer, TopK)
        ranked = sorted(range(NUM_CLASSES), key=lambda index: -float(logits[index]))
        assert answer.indices == ranked[: len(answer.indices)]
        assert answer.scores == pytest.approx([scores[index] for index in answer.indices], rel=1e-5, abs=1e-7)
        if isinstance(request, Classify) and request.threshold is not None:
            assert all(score >= request.threshold for score in answer.scores)
            left_out = [scores[index] for index in ranked[len(answer.indices) :]]
            assert all(score < request.threshold + 1e-6 for score in left_out)
        else:
            assert len(answer.indices) == request.top_k


@given(st.lists(REQUESTS, min_size=2, max_size=8), SEEDS)
def test_a_mixed_batch_is_each_of_its_images_alone(requests: list[Kind], seed: int) -> None:
    outputs = outputs_of(seed, len(requests))
    alone = [answers([request], outputs[row : row + 1])[0] for row, request in enumerate(requests)]
    for mixed, one in zip(answers(requests, outputs), alone, strict=True):
        if isinstance(mixed, Vector):
            assert numbers(mixed) == pytest.approx(numbers(one), rel=1e-6, abs=1e-9)
        else:
            assert isinstance(one, TopK) and mixed.indices == one.indices
            assert mixed.scores == pytest.approx(one.scores, rel=1e-6, abs=1e-9)


def test_a_threshold_names_every_class_from_it_on_and_none_where_none_is_there() -> None:
    outputs = torch.tensor([[0.0, 2.0, -2.0, 1.0], [-3.0, -4.0, -5.0, 1.0]])  # three classes, one feature
    asked = [Classify(**ASKED, top_k=3, activation="sigmoid", threshold=least) for least in (0.5, 0.5)]
    named, none = answers(asked, outputs, num_classes=3)
    assert named == TopK([1, 0], [float(torch.tensor(2.0).sigmoid()), 0.5]) and none == TopK([], [])


@given(st.lists(EMBEDDING | st.builds(lambda: Explain(**ASKED, top_k=0)), min_size=1, max_size=4), SEEDS)
def test_a_model_without_classes_gives_vectors_and_names_nothing(requests: list[Kind], seed: int) -> None:
    outputs = outputs_of(seed, len(requests), num_classes=0)
    for request, row, answer in zip(requests, outputs, answers(requests, outputs, num_classes=0), strict=True):
        if isinstance(request, Embed):
            assert numbers(answer) == row.tolist()
        else:
            assert answer == TopK([], [])


def test_only_what_someone_wants_is_fetched() -> None:
    """It is copied from the device: a batch that is only classified brings no features."""
    outputs = outputs_of(0, 2)
    two = Classify(**ASKED, top_k=2)
    batches: list[tuple[list[Kind], int]] = [
        ([two, Classify(**ASKED, top_k=3)], 2 * 3),
        ([two, Embed(**ASKED)], 2 * 2 + NUM_FEATURES),
        ([Embed(**ASKED)] * 2, NUM_FEATURES),
        ([Score(**ASKED), two], 2 * 2 + NUM_CLASSES),
    ]
    for requests, columns in batches:
        wanted = wanted_by([Item(request, 0) for request in requests])
        assert gathered(outputs, NUM_CLASSES, wanted).shape == (2, columns)


def test_images_of_one_activation_are_activated_at_once() -> None:
    """An image that is embedded has none, and does not count as another."""
    classify, embed = Classify(**ASKED, top_k=1), Embed(**ASKED)
    assert wanted_by([Item(each, 0) for each in (embed, classify, classify)]).activations == ("softmax",)
    mixed = [Item(each, 0) for each in (embed, classify, Score(**ASKED))]
    assert wanted_by(mixed).activations == ("softmax", "softmax", "none")


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("logit", [math.inf, math.nan])
def test_a_logit_that_overflowed_is_no_score(logit: float, activation: Activation) -> None:
    """The runner tells what is not finite; a sigmoid would make certainty of it."""
    outputs = outputs_of(0, 1)
    outputs[0, 3] = logit
    for wanted in (Wanted((activation,), top_k=1), Wanted((activation,), scores=True)):
        assert not gathered(outputs, NUM_CLASSES, wanted).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(dtype: torch.dtype) -> None:
    outputs = outputs_of(0, 1).to(dtype)
    (answer,) = answers([Embed(**ASKED)], outputs)
    assert numbers(answer) == outputs[0, NUM_CLASSES:].float().tolist()
