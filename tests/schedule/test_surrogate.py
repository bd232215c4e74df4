"""The surrogate: it learns what is smooth in the token counts, says how much it has learnt, and ignores jitter."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from benchmarks.schedule_parts import surrogate
from benchmarks.schedule_parts.surrogate import Surrogate

LENGTH = 5


def points(count: int, seed: int) -> list[list[float]]:
    """Falling logarithms of token counts."""
    random_numbers = random.Random(seed)
    return [sorted((random_numbers.uniform(1, 5) for _ in range(LENGTH)), reverse=True) for _ in range(count)]


def truth(x: list[float]) -> float:
    """A best number of tokens for each block, and a price of large steps."""
    return sum((each - 4 + i / 2) ** 2 for i, each in enumerate(x)) + 0.3 * sum((b - a) ** 2 for a, b in pairwise(x))


def test_a_smooth_loss_is_learnt_from_few_trials() -> None:
    tried, unseen = points(80, seed=0), points(50, seed=1)
    learnt = Surrogate(tried, [truth(x) for x in tried])
    errors = [abs(guess - truth(x)) for guess, x in zip(learnt(unseen), unseen, strict=True)]
    losses = [truth(x) for x in unseen]
    assert learnt.fit > 0.95
    assert max(errors) < 0.15 * (max(losses) - min(losses))


def test_jitter_is_not_learnt() -> None:
    random_numbers = random.Random(0)
    tried = points(80, seed=0)
    assert Surrogate(tried, [random_numbers.gauss(0, 1) for _ in tried]).fit < 0.1


def test_the_smooth_part_shows_through_jitter() -> None:
    random_numbers = random.Random(0)
    tried, unseen = points(200, seed=0), points(50, seed=1)
    losses = [truth(x) for x in tried]
    sd = float(torch.tensor(losses).std())
    learnt = Surrogate(tried, [loss + random_numbers.gauss(0, sd) for loss in losses])
    guessed_and_true = torch.tensor([learnt(unseen), [truth(x) for x in unseen]])
    assert float(torch.corrcoef(guessed_and_true)[0, 1]) > 0.9
    assert 0.2 < learnt.fit < 0.6  # half of the variance is jitter


def test_counts_that_never_vary_do_no_harm() -> None:
    tried = [[5.0, *x, 0.5] for x in points(80, seed=0)]
    learnt = Surrogate(tried, [truth(x[1:-1]) for x in tried])
    assert learnt.fit > 0.95


@pytest.mark.parametrize("ridge", [1.0, 30.0])
def test_the_error_of_trials_left_out_is_that_of_leaving_each_out(ridge: float) -> None:
    torch.manual_seed(0)
    z, y = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    z, y = z - z.mean(dim=0), y - y.mean()
    with_offset = torch.cat([torch.ones(12, 1, dtype=torch.float64), z], dim=1)
    penalty = torch.diag(torch.tensor([0.0, *[ridge] * 4], dtype=torch.float64))
    expected = 0.0
    for left in range(12):
        kept = torch.arange(12) != left
        rows = with_offset[kept]
        weights = torch.linalg.solve(rows.T @ rows + penalty, rows.T @ y[kept])
        expected += float((y[left] - with_offset[left] @ weights) ** 2)
    assert surrogate._left_out_error(z, y, ridge) == pytest.approx(expected)
