"""timm's transformer blocks in two halves, so that tokens can merge between attention and MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.diff_attention import DiffAttention
from timm.models import beit
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn

from tome_core.attention import proportional_attention
from tome_core.families.attention import attention, diff_attention, difference, heads, split
from tome_core.positions import Position

LAYERS: dict[type[nn.Module], Callable[..., tuple[Tensor, Tensor]]] = {
    Attention: attention,
    AttentionRope: attention,
    EvaAttention: attention,
    RelPosAttention: attention,
    beit.Attention: attention,
    DiffAttention: diff_attention,
}
"""The attention layers that can run with token sizes."""


class Halves(NamedTuple):
    """How one class of blocks runs.

    Attributes:
        attend: (block, x, size, position, num_queries) -> tokens after the attention's residual, (B, num_queries, C),
            and keys, (B, num_heads, N, D). Arguments as for `attention`.
        feed_forward: (block, x) -> tokens after the MLP's residual.
        layers: The block's attention layers.
    """

    attend: Callable[[Any, Tensor, Tensor | None, Position, int | None], tuple[Tensor, Tensor]]
    feed_forward: Callable[[Any, Tensor], Tensor]
    layers: Callable[[Any], Sequence[nn.Module]] = lambda block: [block.attn]


def _pre_attend(
    block: Any, x: Tensor, size: Tensor | None, position: Position, num_queries: int | None
) -> tuple[Tensor, Tensor]:
    y, keys = LAYERS[type(block.attn)](block.attn, block.norm1(x), size, position, num_queries)
    return x[:, :num_queries] + block.drop_path1(_scaled(block, 1, y)), keys


def _pre_feed_forward(block: Any, x: Tensor) -> Tensor:
    y: Tensor = x + block.drop_path2(_scaled(block, 2, block.mlp(block.norm2(x))))
    return y


def _scaled(block: Any, half: int, y: Tensor) -> Tensor:
    """Applies LayerScale, which timm stores as a module, as a parameter, or not at all."""
    if hasattr(block, f"ls{half}"):
        y = getattr(block, f"ls{half}")(y)
    elif getattr(block, f"gamma_{half}", None) is not None:
        y = getattr(block, f"gamma_{half}") * y
    return y


def _post_attend(
    block: Any, x: Tensor, size: Tensor | None, position: Position, num_queries: int | None
) -> tuple[Tensor, Tensor]:
    y, keys = LAYERS[type(block.attn)](block.attn, x, size, position, num_queries)
    return x[:, :num_queries] + block.drop_path1(block.norm1(y)), keys


def _post_feed_forward(block: Any, x: Tensor) -> Tensor:
    y: Tensor = x + block.drop_path2(block.norm2(block.mlp(x)))
    return y


def _things_attend(
    block: Any, x: Tensor, size: Tensor | None, position: Position, num_queries: int | None
) -> tuple[Tensor, Tensor]:
    """Several parallel attentions; their heads count alike in the metric."""
    sides, keys = [], []
    for side in block.attns:
        y, k = LAYERS[type(side.attn)](side.attn, side.norm(x), size, position, num_queries)
        sides.append(side.drop_path(side.ls(y)))
        keys.append(k)
    return x[:, :num_queries] + torch.stack(sides).sum(dim=0), torch.cat(keys, dim=1)


def _things_feed_forward(block: Any, x: Tensor) -> Tensor:
    y: Tensor = x + torch.stack([side(x) for side in block.ffns]).sum(dim=0)
    return y


def _parallel_attend(
    block: Any, x: Tensor, size: Tensor | None, position: Position, num_queries: int | None
) -> tuple[Tensor, Tensor]:
    """Attention and MLP are one sum here, so nothing fits between them: the whole block runs, then tokens merge."""
    hidden, C, _, _ = block.in_split
    first, k, v = split(block.in_proj, block.in_norm(x), [hidden + C, C, C], num_queries)
    mlp, q = first.split([hidden, C], dim=-1)
    if block.mlp_bias is not None:
        mlp = mlp + block.mlp_bias
    if isinstance(block, DiffParallelScalingBlock):
        y, keys = difference(block, q, k, v, size, position)
    else:
        q, keys = block.q_norm(heads(q, block.num_heads)), block.k_norm(heads(k, block.num_heads))
        dropout = block.attn_drop.p if block.training else 0.0
        y = proportional_attention(q, keys, heads(v, block.num_heads), size, position.bias, dropout)
        y = y.transpose(1, 2).flatten(2)
    mlp = block.mlp_drop(block.mlp_act(mlp))
    if block.out_proj is not None:
        y = block.out_proj(torch.cat([y, mlp], dim=-1))
    else:
        y = block.attn_out_proj(y) + block.mlp_out_proj(mlp)
    return x[:, :num_queries] + block.drop_path(block.ls(y)), keys


def _nothing(block: Any, x: Tensor) -> Tensor:
    return x


_PRE_NORM = Halves(_pre_attend, _pre_feed_forward)
_POST_NORM = Halves(_post_attend, _post_feed_forward)
_PARALLEL = Halves(_parallel_attend, _nothing, lambda block: [])

HALVES: dict[type[nn.Module], Halves] = {
    Block: _PRE_NORM,
    EvaBlock: _PRE_NORM,
    RelPosBlock: _PRE_NORM,
    beit.Block: _PRE_NORM,
    ResPostBlock: _POST_NORM,
    EvaBlockPostNorm: _POST_NORM,
    ResPostRelPosBlock: _POST_NORM,
    ParallelThingsBlock: Halves(_things_attend, _things_feed_forward, lambda block: [s.attn for s in block.attns]),
    ParallelScalingBlock: _PARALLEL,
    DiffParallelScalingBlock: _PARALLEL,
}
"""The blocks that can run in halves, by exact class."""

try:
    from timm.models.deepseek_vit import DeepseekVitBlock
except ImportError:  # older timm
    pass
else:
    HALVES[DeepseekVitBlock] = _PRE_NORM
