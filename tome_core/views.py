"""Random views of photos, whole batches at a time on the device: what a model is tuned on, from few photos.

Nothing here waits for the device or copies to it, so that a step is queued while the one before still runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_AREA = 0.35
MIXUP_BETA = 0.4


def cropped(photos: Tensor, side: tuple[int, int]) -> Tensor:
    """Random crops of 35 % of the area and more, half of them mirrored.

    Args:
        photos: (B, 3, H, W), any float dtype.
        side: Height and width of a view.

    Returns:
        (B, 3, *side).
    """
    B, device = len(photos), photos.device
    scale = (SMALLEST_AREA + (1 - SMALLEST_AREA) * torch.rand(B, device=device)).sqrt()
    shift = (2 * torch.rand(2, B, device=device) - 1) * (1 - scale)
    mirror = torch.where(torch.rand(B, device=device) < 0.5, -scale, scale)
    zero = torch.zeros_like(scale)
    rows = torch.stack([torch.stack([mirror, zero, shift[0]], 1), torch.stack([zero, scale, shift[1]], 1)], 1)
    grid = F.affine_grid(rows.to(photos.dtype), [B, photos.shape[1], *side], align_corners=False)
    return F.grid_sample(photos, grid, padding_mode="reflection", align_corners=False)


def mixed(views: Tensor) -> Tensor:
    """Each view mixed with another of the batch: all blended by mixup, or all with one square pasted by CutMix.

    Args:
        views: (B, 3, H, W).

    Source: Zhang et al., mixup, ICLR 2018; Yun et al., CutMix, ICCV 2019.
    """
    device, (height, width) = views.device, views.shape[-2:]
    others = views.roll(1, dims=0)
    one = torch.ones((), device=device)
    share = torch.distributions.Beta(MIXUP_BETA * one, MIXUP_BETA * one, validate_args=False).sample()
    rows, columns = (_span(torch.rand((), device=device).sqrt(), length, device) for length in (height, width))
    square = (rows[:, None] & columns[None, :]).float()
    is_cut = torch.rand((), device=device) < 0.5
    return torch.lerp(views, others, torch.where(is_cut, square, share).to(views.dtype))


def _span(share: Tensor, length: int, device: torch.device) -> Tensor:
    """A stretch of a line at a random place, (length,) bool."""
    covered = share * length
    start = torch.rand((), device=device) * (length - covered)
    at = torch.arange(length, device=device)
    return (at >= start) & (at < start + covered)
