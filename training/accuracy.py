"""Top-1 over a split, distributed over all processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from training.data import Split
from training.parallel import average_, mine, world_size


@torch.no_grad()
def top1(classify: Callable[[Tensor], Tensor], split: Split) -> float:
    """The share of images whose label has the largest logit.

    Args:
        classify: Normalised images (B, 3, H, W) to logits (B, K); in bfloat16 on a GPU.
        split: On the device.
    """
    images, labels = mine(split.images), mine(split.labels)
    right = torch.zeros((), device=labels.device)
    for x, wanted in zip(images.split(500), labels.split(500), strict=True):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            right += (classify(x.float() / 127.5 - 1).argmax(1) == wanted).sum()
    return average_(right).item() * world_size() / len(split.labels)
