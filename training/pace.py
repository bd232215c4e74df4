"""How training proceeds: what share of it each epoch is, the learning rate along the way, and `r` for each step."""

from __future__ import annotations

import math

import torch

WARM_UP = 0.03  # of the training
LARGEST_R = 22  # 257 tokens and 12 blocks: 21 halves the FLOPs, so the model shall be good at that too
SHARE_OF_R0 = 0.3


def learning_rate(progress: float, highest: float) -> float:
    """Linear warm-up, then a cosine down to a thousandth.

    Args:
        progress: How much of the training is done, 0 to 1.
        highest: The rate after the warm-up.
    """
    if progress < WARM_UP:
        return highest * progress / WARM_UP
    return highest * (0.001 + 0.999 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2)


def random_r(generator: torch.Generator) -> int:
    """Every third step or so merges nothing; the others any r alike, so that the model is good at all of them."""
    if torch.rand((), generator=generator) < SHARE_OF_R0:
        return 0
    return int(torch.randint(1, LARGEST_R + 1, (), generator=generator))
