"""Shows what merged: the patches in each token after a block, and a picture painted by these groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_core.schedule import RLike
from tome_core.tokens import Tokens
from tome_core.vit import MergedViT


@torch.no_grad()
def sources(merged: MergedViT, images: Tensor, r: RLike, blocks: Sequence[int]) -> list[Tensor]:
    """The row of every input token after some blocks.

    Args:
        merged: The merging model.
        images: (B, 3, H, W), normalised as the model wants them.
        r: Tokens merged in each block, as in `MergedViT.forward`.
        blocks: Blocks after which to look, counted from 0.

    Returns:
        For each of `blocks`, the row that holds each input token after it, (B, N0) int64, prefix included.

    Raises:
        ValueError: A block is not one of the model's, or r is wrong.
    """
    in_order = sorted(set(blocks))
    kept = dict(zip(in_order, merged.tokens_after(in_order, images, r), strict=True))
    return [_rows(kept[block]) for block in blocks]


def _rows(tokens: Tokens) -> Tensor:
    """The row of every input token, (B, N0) int64, also while nothing has merged."""
    B, N, _ = tokens.x.shape
    return torch.arange(N, device=tokens.x.device).expand(B, N) if tokens.source is None else tokens.source


def groups(source: Tensor) -> Tensor:
    """Names the group of each patch by its first patch. A group keeps its name when later patches join it.

    Args:
        source: Row that now holds each patch, (B, N), as `sources` gives it, without the prefix.

    Returns:
        For each patch the first one in its group, (B, N) int64.
    """
    together = source[:, :, None] == source[:, None, :]
    return together.byte().argmax(dim=2)


def paint(image: Tensor, source: Tensor, grid: tuple[int, int], num_prefix_tokens: int, border: int = 1) -> Tensor:
    """Paints a picture by merged group: each in its mean colour, with a line where another group begins.

    A patch that has not merged keeps its pixels, because the model still sees it in detail. Lines lie inside their
    group. Their colour identifies the group and its scattered parts. It depends on the group's first patch, so a group
    keeps its colour from block to block.

    Args:
        image: The model's input, (3, H, W) uint8, at any enlargement; H and W are multiples of the grid's.
        source: Row that now holds each input token, (N0,) int64, prefix included: one image of `sources`.
        grid: Rows and columns of patches.
        num_prefix_tokens: Leading tokens that are no patches.
        border: Width of the line in pixels; 0 draws none.

    Returns:
        The painted picture, (3, H, W) uint8, on the CPU.

    Raises:
        ValueError: The image is not (3, H, W) uint8, its size is no multiple of the grid, source does not fit the
            grid, or border is negative.

    Source: after the image visualizations of Bolya et al., Token Merging, ICLR 2023; there lone patches are flat too.
    """
    rows, columns = grid
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        raise ValueError(f"image is {tuple(image.shape)} of {image.dtype}; it must be (3, H, W) of torch.uint8")
    _, H, W = image.shape
    if H % rows or W % columns or not H * W:
        raise ValueError(f"image is {H} x {W} pixels; each side must be a multiple of the grid's {rows} x {columns}")
    if source.shape != (num_prefix_tokens + rows * columns,):
        raise ValueError(
            f"source has shape {tuple(source.shape)}; it must be ({num_prefix_tokens + rows * columns},), "
            f"for {num_prefix_tokens} prefix tokens and {rows} x {columns} patches"
        )
    if border < 0:
        raise ValueError(f"border is {border}; it must be 0 or more")
    image, group = image.cpu(), groups(source[None, num_prefix_tokens:].cpu())[0]
    merged = group.bincount(minlength=rows * columns) > 1
    fill, line = _mean_colours(image, group, grid), _line_colours(grid)
    at = group.view(grid).repeat_interleave(H // rows, 0).repeat_interleave(W // columns, 1)  # (H, W)
    painted = torch.where(_edges(at, border), line[:, at], fill[:, at])
    return torch.where(merged[at], painted, image)


def _mean_colours(image: Tensor, group: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean colour of the group that each patch begins, (3, N) uint8; summed in integers, exact at any size."""
    rows, columns = grid
    cells = image.long().view(3, rows, image.shape[1] // rows, columns, image.shape[2] // columns)
    sums = torch.zeros(3, len(group), dtype=torch.long).index_add(1, group, cells.sum(dim=(2, 4)).flatten(1))
    pixels = group.bincount(minlength=len(group)).clamp(min=1) * (cells.shape[2] * cells.shape[4])
    return ((sums + pixels // 2) // pixels).byte()


def _line_colours(grid: tuple[int, int]) -> Tensor:
    """A bright colour for each patch, (3, N) uint8, its hue far from those of its neighbours."""
    rows, columns = grid
    # 1/p and 1/p^2 of the plastic ratio p spread in two dimensions as the golden ratio does in one.
    hue = (torch.arange(rows)[:, None] * 0.569840 + torch.arange(columns) * 0.754878).flatten()
    # Along the circle of hues a channel is full for a third, empty for a third, and runs straight between.
    offset = (hue + torch.tensor([0.0, 2 / 3, 1 / 3])[:, None]) % 1
    saturated = (6 * (offset - 0.5).abs() - 1).clamp(0, 1)
    return (255 * (0.2 + 0.8 * saturated)).byte()


def _edges(at: Tensor, border: int) -> Tensor:
    """Pixels with another group within `border` pixels, (H, W) bool. The rim of the picture is no edge."""
    at = at[None].float()  # patches are few: exact
    side = 2 * border + 1
    largest = F.max_pool2d(at, side, stride=1, padding=border)
    smallest = -F.max_pool2d(-at, side, stride=1, padding=border)
    return (largest != smallest)[0]
