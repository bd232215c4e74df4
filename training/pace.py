"""The pace of training: the share of each epoch, the learning rate over time, and `r` for each step."""

from __future__ import annotations

import math

import torch

WARM_UP = 0.03  # of the training
LARGEST_R = 22  # 257 tokens and 12 blocks: 21 halves the FLOPs, so the model must be good at that too
SHARE_OF_R0 = 0.3


def learning_rate(progress: float, highest: float) -> float:
    """Linear warm-up, then a cosine down to a thousandth.

    Args:
        progress: Share of the training that is done, 0 to 1.
        highest: The rate after the warm-up.
    """
    if progress < WARM_UP:
        return highest * progress / WARM_UP
    return highest * (0.001 + 0.999 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2)


def random_r(generator: torch.Generator) -> int:
    """About every third step merges nothing; the others use any r with equal probability, so that the model is good at
    all.
    """
    if torch.rand((), generator=generator) < SHARE_OF_R0:
        return 0
    return int(torch.randint(1, LARGEST_R + 1, (), generator=generator))
