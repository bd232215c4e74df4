"""Augmentation of whole batches on the device: one grid sample for geometry, a few blends for colour, then mixing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor) -> Tensor:
    """Crops, flips, turns, recolours and normalises.

    Args:
        images: (B, 3, H, W) uint8.

    Returns:
        (B, 3, H, W) float32 in [-1, 1], which is what the model is fed.
    """
    x = images.float() / 255
    return _colour(_geometry(x)) * 2 - 1


def mix(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mixes each image with another of the batch: CutMix for half of the batches, mixup for the rest.

    Args:
        x: (B, 3, H, W).
        targets: (B, K) class probabilities, mixed in the same proportion.
    """
    partner = torch.randperm(x.shape[0], device=x.device)
    if torch.rand(()) < 0.5:
        share = torch.distributions.Beta(0.8, 0.8).sample().item()
        x = torch.lerp(x[partner], x, share)
    else:
        _, _, height, width = x.shape
        side = (1 - torch.rand(()).item()) ** 0.5
        box_height, box_width = int(height * side), int(width * side)
        top = int(torch.randint(height - box_height + 1, ()))
        left = int(torch.randint(width - box_width + 1, ()))
        x = x.clone()
        area = (..., slice(top, top + box_height), slice(left, left + box_width))
        x[area] = x[partner][area]
        share = 1 - box_height * box_width / (height * width)
    return x, torch.lerp(targets[partner], targets, share)


def _geometry(x: Tensor, smallest_area: float = 0.25, degrees: float = 15.0) -> Tensor:
    """A random crop of random aspect, flipped at random and turned a little, as one affine resampling."""
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
    """Brightness, contrast and saturation by random factors; now and then grey or solarised."""
    B, device = x.shape[0], x.device

    def factor() -> Tensor:
        return torch.empty(B, 1, 1, 1, device=device).uniform_(1 - strength, 1 + strength)

    def chosen(share: float) -> Tensor:
        return torch.rand(B, 1, 1, 1, device=device) < share

    weights = torch.tensor([0.299, 0.587, 0.114], device=device)[:, None, None]
    x = x * factor()
    x = torch.lerp(x.mean(dim=(1, 2, 3), keepdim=True), x, factor())
    grey = (x * weights).sum(1, keepdim=True)
    x = torch.lerp(grey, x, torch.where(chosen(0.1), 0.0, factor())).clamp(0, 1)
    return torch.where(chosen(0.1) & (x > 0.5), 1 - x, x)
