"""Scores with features behind them: of one pass, in a batch with images of which other things are wanted."""

from __future__ import annotations

import time
from typing import Any

import torch

from server.device.outcome import Found, gathered, wanted_by
from server.images.image import Pixels
from server.ipc.messages import Classify, Embed, Item, Score, TopK, Vector

K, C = 5, 3


def test_each_image_gets_what_it_wants_of_a_shared_batch() -> None:
    common: dict[str, Any] = {"model": "tiny", "images": [Pixels(b"")], "deadline": time.monotonic() + 1e6}
    requests: list[Any] = [
        Score(**common, activation="sigmoid", features=True),
        Score(**common),
        Embed(**common),
        Classify(**common, top_k=2),
        Score(**common, activation="softmax", features=True),
    ]
    items = [Item(request, 0) for request in requests]
    outputs = torch.randn(len(items), K + C)
    logits, features = outputs[:, :K], outputs[:, K:]
    wanted = wanted_by(items)
    found = Found(gathered(outputs, K, wanted), K, wanted)
    results = [found.of(row, item) for row, item in enumerate(items)]

    def numbers(vector: TopK | Vector) -> torch.Tensor:
        assert isinstance(vector, Vector)
        return torch.frombuffer(bytearray(vector.values), dtype=torch.float32)

    torch.testing.assert_close(numbers(results[0]), torch.cat((logits[0].sigmoid(), features[0])))
    torch.testing.assert_close(numbers(results[1]), logits[1])
    torch.testing.assert_close(numbers(results[2]), features[2])
    assert isinstance(results[3], TopK) and results[3].indices == logits[3].topk(2).indices.tolist()
    torch.testing.assert_close(numbers(results[4]), torch.cat((logits[4].softmax(0), features[4])))


def test_features_are_fetched_only_where_they_are_wanted() -> None:
    common: dict[str, Any] = {"model": "tiny", "images": [Pixels(b"")], "deadline": 1.0}
    for request, features in (
        (Score(**common), False),
        (Score(**common, features=True), True),
        (Embed(**common), True),
    ):
        assert wanted_by([Item(request, 0)]).features == features
