"""Positions that travel with their tokens through fused blocks: they are added up as tokens merge.

There are three kinds, after the positions of the families. A rotary table that all blocks and heads share: its sines
and cosines, (N, 2D). A bias of relative positions: rows and columns of the grid, (N, 2). A rotary table for each block
and head: the members themselves, (N, N0) and some zeros. `tome_core.positions` defines the means.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_core.kernels.relative import Bias, bias_of, cells_of, table_of
from tome_core.positions import Position


def start(position: Position, x: Tensor, num_prefix_tokens: int) -> Tensor | None:
    """The positions of tokens before the first merge.

    Args:
        position: Position of the first block.
        x: The tokens, (B, N0, C).
        num_prefix_tokens: Leading tokens, which have no position.

    Returns:
        (1 or B, N0, K), or None if attention uses no positions.
    """
    if position.rope is not None and position.rope.ndim == 2:
        return _with_prefix(position.rope, num_prefix_tokens)[None].float()
    if position.rope is not None:
        return torch.eye(x.shape[1], _padded(x.shape[1]), dtype=x.dtype, device=x.device)[None]
    if position.bias is not None and position.grid is not None:
        return cells_of(position.grid, num_prefix_tokens, x.device).expand(x.shape[0], -1, -1).contiguous()
    return None


def table_at(rope: Tensor, places: Tensor | None, size: Tensor | None, num_prefix_tokens: int) -> Tensor:
    """A block's rotary table for its tokens, added up over their members.

    Args:
        rope: The block's table for the original patches: (N0 - P, 2D), or (num_heads, N0 - P, 2D).
        places: The positions of the tokens, (1 or B, N, K).
        size: Token sizes, (B, N) float32; None before the first merge.
        num_prefix_tokens: Leading tokens P, which are not rotated.

    Returns:
        (1 or B, N, 2D), or (1 or B, N, num_heads * 2D).
    """
    assert places is not None
    if rope.ndim == 2:
        return places
    table = _with_prefix(rope, num_prefix_tokens).transpose(0, 1).flatten(1)
    if size is None:
        return table[None].contiguous()
    return places @ F.pad(table.to(places.dtype), (0, 0, 0, places.shape[2] - len(table)))


def bias_at(position: Position, places: Tensor | None, size: Tensor | None, num_prefix_tokens: int) -> Bias | None:
    """A block's bias between its tokens, or None. Arguments as for `table_at`."""
    if position.bias is None or position.grid is None or places is None:
        return None
    size = places.new_ones(places.shape[:2]) if size is None else size
    return bias_of(
        table_of(position.bias, position.grid, num_prefix_tokens), places, size, position.grid, num_prefix_tokens
    )


def _padded(n: int) -> int:
    """The next multiple of 8: products of other sizes are slow in half precision."""
    return n + -n % 8


def _with_prefix(rope: Tensor, num_prefix_tokens: int) -> Tensor:
    """Sines and cosines (..., N, 2D) with those of the prefix tokens before them, which rotate by 0."""
    nothing = rope.new_zeros(*rope.shape[:-2], num_prefix_tokens, rope.shape[-1])
    nothing[..., rope.shape[-1] // 2 :] = 1
    return torch.cat([nothing, rope], dim=-2)
