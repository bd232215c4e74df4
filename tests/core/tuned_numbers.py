"""Random tuned numbers for small models, and the timm models that have them as their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tome_core import MergedViT
from tome_core.tuned import Band, Tuned, fingerprints, tunable

BANDS = ((3, 4), (7, 9))


def numbers(merged: MergedViT, *bands: tuple[int, int]) -> Tuned:
    """Tuned numbers for a float32 model, far from its own; for `BANDS` if for no others."""
    generator = torch.Generator().manual_seed(1)
    own = tunable(merged.model, merged.family)

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach() + 0.3 * torch.randn(tensor.shape, generator=generator)

    made = [Band(low, high, {name: moved(tensor) for name, tensor in own.items()}) for low, high in bands or BANDS]
    return Tuned(made, fingerprints(merged.model), {"photos": 100})


def having(model: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A copy of a timm model with these numbers, as its own code loads them."""
    model = copy.deepcopy(model)
    unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
    assert not unexpected
    return model
