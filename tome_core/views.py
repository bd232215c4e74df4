"""Random views of photos, so that a few photos give many training images. A batch is made at once, on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_AREA = 0.35
MIXUP_BETA = 0.4


def views(photos: Tensor, size: tuple[int, int], count: int, mix: bool) -> Tensor:
    """Random views of randomly drawn photos.

    Args:
        photos: (N, 3, H, W) uint8.
        size: Height and width of a view.
        count: Number of views.
        mix: Whether to mix each view with another.

    Returns:
        (count, 3, *size) float32, from 0 to 1, on the device of the photos.
    """
    N, device = len(photos), photos.device
    drawn = torch.cat([torch.randperm(N, device=device) for _ in range(-(-count // N))])[:count]
    cut = cropped(photos[drawn].float() / 255, size)
    return mixed(cut) if mix else cut


def cropped(photos: Tensor, size: tuple[int, int]) -> Tensor:
    """Random crops of 35 to 100 % of the area, half of them mirrored: (B, 3, H, W) to (B, 3, *size)."""
    B, device = len(photos), photos.device
    scale = (SMALLEST_AREA + (1 - SMALLEST_AREA) * torch.rand(B, device=device)).sqrt()
    shift = (2 * torch.rand(2, B, device=device) - 1) * (1 - scale)
    mirror = torch.where(torch.rand(B, device=device) < 0.5, -scale, scale)
    zero = torch.zeros_like(scale)
    rows = torch.stack([torch.stack([mirror, zero, shift[0]], 1), torch.stack([zero, scale, shift[1]], 1)], 1)
    grid = F.affine_grid(rows, [B, photos.shape[1], *size], align_corners=False)
    return F.grid_sample(photos, grid, padding_mode="reflection", align_corners=False)


def mixed(images: Tensor) -> Tensor:
    """Each image (B, 3, H, W) mixed with another: either all are blended by one share, or all get one rectangle of the
    other.

    Source: Zhang et al., mixup, ICLR 2018; Yun et al., CutMix, ICCV 2019.
    """
    height, width = images.shape[-2:]
    others = images.roll(1, dims=0)
    if torch.rand(()) < 0.5:
        share = float(torch.distributions.Beta(MIXUP_BETA, MIXUP_BETA).sample())
        return torch.lerp(images, others, share)
    rows, columns = (_stretch(length) for length in (height, width))
    mixture = images.clone()
    mixture[:, :, rows, columns] = others[:, :, rows, columns]
    return mixture


def _stretch(length: int) -> slice:
    """A part of a line, with a random place and length; long parts are likelier than short ones."""
    covered = round(length * float(torch.rand(()).sqrt()))
    start = int(torch.randint(length - covered + 1, ()))
    return slice(start, start + covered)
