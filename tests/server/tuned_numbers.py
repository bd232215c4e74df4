"""Tuned numbers for tests: a model's own, moved at random."""

from __future__ import annotations

import torch

from tome_core import MergedViT
from tome_core.tuned import Band, Tuned, fingerprints, tunable


def tuned_for(merged: MergedViT, *bands: tuple[int, int], seed: int = 0) -> Tuned:
    """Numbers for each band that give other answers than the model's own.

    Args:
        merged: The model, in float32.
        bands: The smallest and the largest `r` of each.
        seed: Of the numbers.
    """
    random_numbers = torch.Generator().manual_seed(seed)
    own = tunable(merged.model, merged.family)

    def moved() -> dict[str, torch.Tensor]:
        return {
            name: tensor.detach() + 0.3 * torch.randn(tensor.shape, generator=random_numbers)
            for name, tensor in own.items()
        }

    return Tuned([Band(low, high, moved()) for low, high in bands], fingerprints(merged.model), {})
