"""The model outputs that requests want: gathered on the device for a whole batch, then read image by image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from server.ipc.messages import Classify, Embed, Explain, Item, Score, TopK, Vector
from server.types import Activation


class Wanted(NamedTuple):
    """The outputs to fetch for a batch: those that any of its images wants.

    Attributes:
        activations: The activation of each image; one for all if they are equal.
        top_k: Number of likeliest classes; 0 for none.
        scores: Whether to fetch the scores of all classes.
        features: Whether to fetch the pooled features.
    """

    activations: tuple[Activation, ...]
    top_k: int = 0
    scores: bool = False
    features: bool = False


def wanted_by(items: Sequence[Item]) -> Wanted:
    """The outputs that a batch of images wants."""
    requests = list({id(item.request): item.request for item in items}.values())  # the images of a request share it
    named: list[Activation] = [request.activation for request in requests if not isinstance(request, Embed)] or ["none"]
    is_mixed = len(set(named)) > 1
    return Wanted(
        activations=tuple(_activation_of(item, named[0]) for item in items) if is_mixed else (named[0],),
        top_k=max((request.top_k for request in requests if isinstance(request, Classify | Explain)), default=0),
        scores=any(isinstance(request, Score) for request in requests),
        features=any(
            isinstance(request, Embed) or (isinstance(request, Score) and request.features) for request in requests
        ),
    )


def _activation_of(item: Item, default: Activation) -> Activation:
    return default if isinstance(item.request, Embed) else item.request.activation


def gathered(outputs: Tensor, num_classes: int, wanted: Wanted) -> Tensor:
    """Gathers the wanted outputs of a batch in one tensor, so that one copy fetches them.

    Args:
        outputs: Logits and pooled features, (B, K + C).
        num_classes: K.
        wanted: The wanted outputs.

    Returns:
        Float32, (B, columns): the classes' indices, their scores, the scores of all classes, the features; each if it
        is wanted. Float32 holds indices up to 2^24 exactly.
    """
    logits = outputs[:, :num_classes].float()
    scores = _activated(logits, wanted.activations) if wanted.top_k or wanted.scores else logits
    columns = []
    if wanted.top_k:
        indices = logits.topk(wanted.top_k, dim=1).indices
        columns += [indices.float(), scores.gather(1, indices)]
    if wanted.scores:
        columns.append(scores)
    if wanted.features:
        columns.append(outputs[:, num_classes:].float())
    return torch.cat(columns, dim=1) if columns else logits[:, :0]  # an explanation by a model without classes


class Found:
    """The result of `gathered`, on the CPU.

    Args:
        columns: The result.
        num_classes: Number of the model's classes.
        wanted: The wanted outputs.
    """

    def __init__(self, columns: Tensor, num_classes: int, wanted: Wanted) -> None:
        k, dense = wanted.top_k, num_classes if wanted.scores else 0
        self._indices: list[list[int]] = columns[:, :k].to(torch.int64).tolist()
        self._scores: list[list[float]] = columns[:, k : 2 * k].tolist()
        self._dense, self._features = columns[:, 2 * k : 2 * k + dense], columns[:, 2 * k + dense :]

    def top_k(self) -> list[tuple[list[int], list[float]]]:
        """The likeliest classes of each image, and their scores."""
        return list(zip(self._indices, self._scores, strict=True))

    def scores(self) -> Tensor:
        """The scores of all classes, (B, K)."""
        return self._dense

    def features(self) -> Tensor:
        """The pooled features, (B, C)."""
        return self._features

    def of(self, row: int, item: Item) -> TopK | Vector:
        """The result of one image."""
        request = item.request
        if isinstance(request, Score):
            dense = self._dense[row]
            return _vector(torch.cat((dense, self._features[row])) if request.features else dense)
        if isinstance(request, Embed):
            return _vector(self._features[row])
        indices, scores = self._indices[row][: request.top_k], self._scores[row][: request.top_k]
        if isinstance(request, Classify) and request.threshold is not None:
            named = sum(score >= request.threshold for score in scores)  # scores are in descending order
            indices, scores = indices[:named], scores[:named]
        return TopK(indices, scores)


def _activated(logits: Tensor, activations: Sequence[Activation]) -> Tensor:
    """Scores of logits (B, K), by the activation of each image."""
    if len(activations) == 1:
        return _activation(logits, activations[0])
    # By runs of rows, because gathering the rows of one activation would copy indices to a GPU, and wait for it.
    runs = [(activation, len(list(run))) for activation, run in itertools.groupby(activations)]
    parts = logits.split([rows for _, rows in runs])
    return torch.cat([_activation(part, activation) for part, (activation, _) in zip(parts, runs, strict=True)])


def _activation(logits: Tensor, activation: Activation) -> Tensor:
    if activation == "softmax":
        return logits.softmax(dim=1)
    # Zero times infinity is NaN: an overflowed logit becomes an error instead of certainty.
    return logits.sigmoid() + 0 * logits if activation == "sigmoid" else logits


def _vector(row: Tensor) -> Vector:
    return Vector(row.numpy().astype("<f4", copy=False).tobytes())
