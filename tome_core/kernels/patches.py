"""Images cut into patches, one a row, for the product with the weights of a patch embedding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tome_core.kernels.launch import Kernel, ceil_div, power_of_2

ROWS = 4
"""Patches of a program."""


@triton.jit(do_not_specialize=["num_patches", "num_columns"])
def _cut(
    images, out, num_patches, num_columns,
    PLANE: tl.constexpr, LINE: tl.constexpr, PATCH: tl.constexpr, RUN: tl.constexpr,
    K: tl.constexpr, K_OUT: tl.constexpr, K_PAD: tl.constexpr,
    ROWS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One program: ROWS patches of an image, which consists of planes of lines. A patch has RUN values of a line."""
    image = tl.program_id(1).to(tl.int64)
    patch, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, K_PAD)
    corner = patch // num_columns * PATCH * LINE + patch % num_columns * RUN
    value = k // (PATCH * RUN) * PLANE + k // RUN % PATCH * LINE + k % RUN
    images += image * PLANE * (K // (PATCH * RUN))
    inside = patch[:, None] < num_patches
    pixels = tl.load(images + corner[:, None] + value[None, :], inside & (k[None, :] < K), 0.0).to(tl.float32)
    pixels = tl.where(k[None, :] < K, pixels - SHIFT, 0.0)
    out += (image * num_patches + patch[:, None]) * K_OUT + k[None, :]
    tl.store(out, pixels.to(out.dtype.element_ty), inside & (k[None, :] < K_OUT))


def cut(images: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """See `reference.cut`."""
    pixels = images.dtype == torch.uint8
    B, channels, H, W = (images.shape[i] for i in ((0, 3, 1, 2) if pixels else (0, 1, 2, 3)))
    run, line = (channels * patch, channels * W) if pixels else (patch, W)
    num_patches, K = (H // patch) * (W // patch), channels * patch * patch
    padded = -(-K // 8) * 8
    out = torch.empty(B, num_patches, padded, dtype=dtype, device=images.device)
    constants = (H * line, line, patch, run, K, padded, power_of_2(padded), ROWS, 128 if pixels else 0)
    _launch((ceil_div(num_patches, ROWS), B, 1), (images, out), (num_patches, W // patch), constants, num_warps=4)
    return out


_launch = Kernel(_cut)
