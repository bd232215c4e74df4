"""Augmentation of whole batches on the device: one grid sample for geometry, a few blends for colour, then mixing.

Nothing here waits for the device or copies to it, so that a training step is queued while the one before still runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor) -> Tensor:
    """Crops, flips, rotates, recolours and normalises.

    Args:
        images: (B, 3, H, W) uint8.

    Returns:
        (B, 3, H, W) float32 in [-1, 1], the model's input.
    """
    x = images.float() / 255
    return _colour(_geometry(x)) * 2 - 1


class Mixture(NamedTuple):
    """Mixed images.

    Attributes:
        images: (B, 3, H, W).
        partner: The image of the batch that each was mixed with, (B,) int64.
        share: The partner's share of each, (B,) in [0, 1].
    """

    images: Tensor
    partner: Tensor
    share: Tensor


def mix(x: Tensor) -> Mixture:
    """Mixes each image with another of the batch: half of them by CutMix, the others by mixup, in random proportions.

    Args:
        x: (B, 3, H, W).
    """
    B, _, height, width = x.shape
    partner = torch.randperm(B, device=x.device)
    share = torch.rand(B, device=x.device)
    rows, columns = _span(share.sqrt(), height), _span(share.sqrt(), width)
    box = rows[:, None, :, None] & columns[:, None, None, :]
    cut = torch.rand(B, device=x.device) < 0.5
    blend = torch.where(_per_image(cut), box.float(), _per_image(share))
    return Mixture(torch.lerp(x, x[partner], blend), partner, blend.mean(dim=(1, 2, 3)))


def _span(extent: Tensor, length: int) -> Tensor:
    """A stretch of each of B lines, at a random place: extent (B,) in [0, 1] to (B, length) bool."""
    covered = (extent * length).floor()
    start = (torch.rand_like(extent) * (length - covered + 1)).floor()
    at = torch.arange(length, device=extent.device)
    return (at >= start[:, None]) & (at < (start + covered)[:, None])


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _geometry(x: Tensor, smallest_area: float = 0.2, degrees: float = 15.0) -> Tensor:
    """A random crop of random aspect, flipped at random and rotated a little, as one affine resampling."""
    B, device = x.shape[0], x.device
    area = torch.empty(B, device=device).uniform_(smallest_area, 1)
    aspect = torch.empty(B, device=device).uniform_(-0.29, 0.29).exp()  # 3:4 to 4:3
    height = (area / aspect).sqrt().clamp(max=1)
    width = (area * aspect).sqrt().clamp(max=1)
    centre_x = (torch.rand(B, device=device) * 2 - 1) * (1 - width)
    centre_y = (torch.rand(B, device=device) * 2 - 1) * (1 - height)
    flip = torch.where(torch.rand(B, device=device) < 0.5, -1.0, 1.0)
    turns = torch.rand(B, device=device) < 0.3
    angle = torch.empty(B, device=device).uniform_(-degrees, degrees).deg2rad() * turns
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([width * flip * cos, -width * sin, centre_x], 1)]
    rows.append(torch.stack([height * flip * sin, height * cos, centre_y], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)


def _colour(x: Tensor, strength: float = 0.4) -> Tensor:
    """Random factors for brightness, contrast and saturation; sometimes grey or solarised."""
    B, device = x.shape[0], x.device

    def factor() -> Tensor:
        return torch.empty(B, 1, 1, 1, device=device).uniform_(1 - strength, 1 + strength)

    def chosen(share: float) -> Tensor:
        return torch.rand(B, 1, 1, 1, device=device) < share

    x = x * factor()
    x = torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True), x, factor())
    grey = 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]
    x = torch.lerp(grey, x, torch.where(chosen(0.1), 0.0, factor())).clamp(0, 1)
    return torch.where(chosen(0.1) & (x > 0.5), 1 - x, x)
