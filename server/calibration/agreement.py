"""Agreement of an `r` with r=0: by the likeliest class, the set of labels, or the nearest neighbours of a photo."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from server.curve import AgreementOf, Neighbours
from server.device.outcome import Found, Wanted
from server.intervals import of_mean, wilson
from server.types import LABEL_THRESHOLD, ModelInfo

NEAREST = 10
"""Neighbours of a photo that are compared."""

FEWEST_PHOTOS = NEAREST + 1
"""Fewest photos, because a photo is not its own neighbour."""

_ROWS = 1024  # queries at a time, so that the similarities of many photos need little memory

WANTED: dict[AgreementOf, Wanted] = {
    "top1": Wanted(("none",), top_k=1),
    "labels": Wanted(("sigmoid",), scores=True),
    "neighbours": Wanted(("none",), features=True),
}
"""The model outputs that each kind of agreement needs."""


class Judged(NamedTuple):
    """Agreement with r=0, its 95 % interval over photos, and more if it is of neighbours."""

    agreement: float
    interval: tuple[float, float]
    neighbours: Neighbours | None = None


def default_for(info: ModelInfo) -> AgreementOf:
    """The default kind of agreement for a model."""
    if not info.labels:
        return "neighbours"
    return "labels" if info.activation == "sigmoid" else "top1"


def answers(of: AgreementOf, found: Found) -> Tensor:
    """The compared answers, a row for each image: a class, (B, 1); its labels, (B, K); or its vector, (B, C)."""
    if of == "top1":
        return torch.tensor([indices for indices, _ in found.top_k()])
    return found.scores() >= LABEL_THRESHOLD if of == "labels" else found.features()


def judge(of: AgreementOf, at_r: Tensor, unmerged: Tensor) -> Judged:
    """Compares answers.

    Args:
        of: Their kind.
        at_r: Results of `answers` for all photos.
        unmerged: The same at r=0.
    """
    if of == "neighbours":
        return _by_neighbours(at_r, unmerged)
    hits, count = int((at_r == unmerged).all(dim=1).sum()), len(at_r)
    return Judged(hits / count, wilson(hits, count))


def nearest(queries: Tensor, index: Tensor, k: int = NEAREST) -> Tensor:
    """The k photos of an index that are nearest to each query by cosine, (N, k), without the photo itself.

    Args:
        queries: The vectors of N photos, (N, C).
        index: Vectors of the same photos, (N, C).
        k: Number of neighbours, below N.
    """
    queries, index = F.normalize(queries, dim=1), F.normalize(index, dim=1)
    found = []
    for start, rows in zip(range(0, len(queries), _ROWS), queries.split(_ROWS), strict=True):
        similarity = rows @ index.T
        own = torch.arange(len(rows))
        similarity[own, start + own] = -torch.inf
        found.append(similarity.topk(k, dim=1).indices)
    return torch.cat(found)


def _by_neighbours(at_r: Tensor, unmerged: Tensor) -> Judged:
    wanted = nearest(unmerged, unmerged)
    shares = _kept(nearest(at_r, unmerged), wanted)
    cosine = float(F.cosine_similarity(at_r.double(), unmerged.double()).mean())
    same_index = float(_kept(nearest(at_r, at_r), wanted).mean())
    more = Neighbours(same_index=same_index, cosine=max(-1.0, min(cosine, 1.0)))
    return Judged(float(shares.mean()), of_mean(shares.tolist()), more)


def _kept(found: Tensor, wanted: Tensor) -> Tensor:
    """The share of each photo's wanted neighbours that is found, (N,)."""
    is_found = (wanted[:, :, None] == found[:, None, :]).any(dim=2)
    return is_found.double().mean(dim=1)
