"""Makes the tokens that enter the first block, and their norm, from images or pixels without a normalised image.

A patch embedding is a product plus a constant for every image: a bias, positions, prefix tokens. The model itself
computes this constant, as its embedding of an image of one colour. One pass adds the product and takes the norm. Pixels
stay bytes: their normalisation becomes a factor of the weights, and a grey image gives the constant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tome_core.families.family import Family
from tome_core.families.parts import norm_of, parts_of
from tome_core.kept import kept
from tome_core.kernels import add_norm, cut, norm

GREY = 128
"""The byte that `cut` subtracts, so that it becomes 0."""


class Normalisation(NamedTuple):
    """The normalisation of pixels for a model: (byte / 255 - mean) / std, for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Pixels (B, H, W, channels) in uint8 to images (B, channels, H, W)."""
        self.check(pixels)
        mean, std = (_vector(values, pixels.device)[:, None, None] for values in self)
        B, H, W, channels = pixels.shape
        images = torch.empty(B, channels, H, W, device=pixels.device)
        images.copy_(pixels.permute(0, 3, 1, 2))  # converts and reorders in one pass
        return torch.addcmul(-mean / std, images, 1 / (255 * std), out=images).to(dtype)

    def check(self, pixels: Tensor) -> None:
        """Raises ValueError if these are not pixels with one channel for each mean."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != len(self.mean):
            raise ValueError(
                f"pixels are {pixels.dtype} of shape {tuple(pixels.shape)}; they must be torch.uint8 of shape "
                f"(B, H, W, {len(self.mean)})"
            )

    def grey(self, device: torch.device) -> Tensor:
        """The normalised value of the byte `GREY`, (channels,) float32."""
        mean, std = (_vector(values, device) for values in self)
        return (GREY / 255 - mean) / std

    def factor(self, device: torch.device) -> Tensor:
        """The normalised step of one byte, (channels,) float32."""
        return 1 / (255 * _vector(self.std, device))


def embed(
    family: Family, model: Any, images: Tensor, normalisation: Normalisation | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images to tokens.

    Args:
        family: The model's adapter.
        model: A model whose blocks run fused.
        images: (B, channels, H, W) in the model's dtype; with `normalisation` pixels (B, H, W, channels) in uint8.
        normalisation: Turns pixels into images; None for images.
        dtype: The model's dtype.

    Returns:
        The tokens, (B, N, C), contiguous and new; the first block's norm of them; positions as `Family.embed` has them.
    """
    pixels = normalisation is not None
    if normalisation is not None:
        normalisation.check(images)
    image_size = (images.shape[1], images.shape[2]) if pixels else (images.shape[2], images.shape[3])
    weight, norm_pre = family.projection(model, image_size), family.norm_pre(model)
    channels = images.shape[3 if pixels else 1]
    if weight is None or weight.shape[1] != channels:  # timm's error names the channels
        x, positions, _ = family.embed(model, images if normalisation is None else normalisation(images, dtype))
        x = norm_pre(x).contiguous()
        return x, norm(x, None, parts_of(family.blocks(model)[0]).norm1), positions
    # The largest piece of work is launched first, so that the host prepares the rest while the GPU is busy.
    colour = None
    if normalisation is not None:
        colour, factor = normalisation.grey(images.device), normalisation.factor(images.device)
        weight = (weight * factor[:, None, None]).to(dtype).permute(0, 2, 3, 1)
    rows = cut(images.contiguous(), weight.shape[2], dtype)
    weight = weight.flatten(1)
    padding = rows.shape[2] - weight.shape[1]
    y = F.linear(rows, F.pad(weight, (0, padding)) if padding else weight)
    table, positions, _ = family.embed_colour(model, colour, image_size)
    first, before = parts_of(family.blocks(model)[0]).norm1, norm_of(norm_pre)
    x, n = add_norm(table.contiguous(), y, None, None, before or first)
    if type(norm_pre) is nn.Identity:
        return x, n, positions
    x = n if before is not None else norm_pre(x)
    return x, norm(x, None, first), positions


@kept
def _vector(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A value for each channel."""
    return torch.tensor(values, dtype=torch.float32, device=device)
