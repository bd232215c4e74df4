"""The positions of tokens in attention, after some of them have merged.

The position of a merged token is the mean of those of its input tokens. For a rotary table it is the mean of sines and
cosines, so that its rotated key is the mean of its members' rotated keys. For a bias between pairs of positions it is
the mean of rows and columns of the grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tome_core.precision import full_precision, widened


class Position(NamedTuple):
    """The positions of tokens, as one block's attention uses them.

    Attributes:
        rope: Sines and cosines of a rotary embedding, (..., N - num_prefix_tokens, 2D), or None.
        bias: Added to the attention scores of each pair of tokens, (1 or B, num_heads, N, N), or None.
        grid: Rows and columns of patches that a bias spans.
    """

    rope: Tensor | None = None
    bias: Tensor | None = None
    grid: tuple[int, int] | None = None


NOWHERE = Position()
"""For a block whose attention uses no positions."""


def follow(
    position: Position, source: Tensor, num_tokens: int, num_prefix_tokens: int, size: Tensor | None = None
) -> Position:
    """Positions of merged tokens.

    Args:
        position: Of the N0 original tokens.
        source: Row that now holds each of them, (B, N0) int64.
        num_tokens: Tokens that are left, N.
        num_prefix_tokens: Leading tokens that never merge and have no position.
        size: Number of input tokens in each, (B, N), if some are padding, whose rope is zero.

    Returns:
        Positions of the N tokens: rope (B, 1 or num_heads, N - num_prefix_tokens, 2D), bias (B, num_heads, N, N).
    """
    if position.rope is None and position.bias is None:
        return position
    rows = torch.arange(num_prefix_tokens, num_tokens, device=source.device)
    members = (source[:, None, num_prefix_tokens:] == rows[:, None]).float()  # (B, N - P, N0 - P)
    rope, bias = position.rope, position.bias
    with full_precision(source.device):
        if rope is not None:
            wide = widened(rope)
            count = members.sum(dim=-1) if size is None else size[:, num_prefix_tokens:].clamp(min=1)
            share = (members / count[..., None]).to(wide.dtype)
            rope = (share[:, None] @ wide).to(rope.dtype)
        if bias is not None:
            assert position.grid is not None
            bias = _between(bias, members, position.grid, num_prefix_tokens)
    return Position(rope, bias, position.grid)


def nearest_cell(sums: Tensor, size: Tensor) -> Tensor:
    """The cell of the grid nearest to the mean of cells; halfway between two, the later one.

    Args:
        sums: Rows and columns of the cells, added up, (B, N, 2), whole numbers of any dtype.
        size: Number of these cells, (B, N).

    Returns:
        Row and column, (B, N, 2), of the same dtype.
    """
    # In whole numbers: a mean that lies between two cells would be rounded by the order in which a device adds.
    return torch.div(2 * sums + size[..., None], 2 * size[..., None], rounding_mode="floor")


def _between(bias: Tensor, members: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """The bias (1, H, N0, N0) between merged tokens (B, H, N, N): that between the cells nearest to them."""
    cells = torch.arange(grid[0] * grid[1], device=bias.device)
    cells = torch.stack([cells // grid[1], cells % grid[1]], dim=1)
    nearest = nearest_cell((members @ cells.float()).long(), members.sum(dim=-1).long())
    index = num_prefix_tokens + nearest[..., 0] * grid[1] + nearest[..., 1]
    prefix = torch.arange(num_prefix_tokens, device=bias.device).expand(len(index), -1)
    index = torch.cat([prefix, index], dim=1)
    return bias[0][:, index[:, :, None], index[:, None, :]].transpose(0, 1)
