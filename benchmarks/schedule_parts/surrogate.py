"""A smooth model of a schedule's loss by its token counts, fitted to noisy trials."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Surrogate:
    """Ridge regression on the logarithms of the token counts, their squares, and the squared steps between them.

    Each block has a best number of tokens, and a large step at once costs extra. The ridge is the one that predicts new
    trials best, by leave-one-out.

    Args:
        log_counts: Logarithm of the tokens around each block, (T, L).
        log_losses: Logarithm of the loss of each, (T,).

    Attributes:
        fit: Predicted share of the variance of left-out trials; 1 is all, 0 or less is nothing.
    """

    def __init__(self, log_counts: Sequence[Sequence[float]], log_losses: Sequence[float]) -> None:
        x, y = _tensor(log_counts), _tensor(log_losses)
        self._mean, self._std = x.mean(dim=0), _std(x)
        terms = self._terms(x)
        self._terms_mean, self._terms_std = terms.mean(dim=0), _std(terms)
        z = (terms - self._terms_mean) / self._terms_std
        self._offset = y.mean()
        errors = [_left_out_error(z, y - self._offset, ridge) for ridge in RIDGES]
        ridge = RIDGES[errors.index(min(errors))]
        self._weights = _inverse(z, ridge) @ z.T @ (y - self._offset)
        self.fit = 1 - min(errors) / max(float((y - self._offset).square().sum()), 1e-12)

    def __call__(self, log_counts: Sequence[Sequence[float]]) -> list[float]:
        """Predicts the logarithm of the loss."""
        z = (self._terms(_tensor(log_counts)) - self._terms_mean) / self._terms_std
        predicted: list[float] = (z @ self._weights + self._offset).tolist()
        return predicted

    def _terms(self, x: Tensor) -> Tensor:
        z = (x - self._mean) / self._std
        return torch.cat([z, z.square(), x.diff(dim=1).square()], dim=1)


def _left_out_error(z: Tensor, y: Tensor, ridge: float) -> float:
    """Summed squared error of each trial's prediction from all the others, in closed form."""
    hat = z @ _inverse(z, ridge) @ z.T
    # The offset, which is fitted too, adds one part in T.
    return float(((y - hat @ y) / (1 - hat.diagonal() - 1 / len(y))).square().sum())


def _inverse(z: Tensor, ridge: float) -> Tensor:
    inverse: Tensor = torch.linalg.inv(z.T @ z + ridge * torch.eye(z.shape[1], dtype=z.dtype))
    return inverse


def _std(x: Tensor) -> Tensor:
    """Standard deviations; 1 for constants."""
    std = x.std(dim=0, correction=0)
    return torch.where(std > 1e-9, std, torch.ones_like(std))


def _tensor(values: Sequence[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
