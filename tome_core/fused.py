"""The forward loop of plain ViT blocks by fused operations: what is saved in arithmetic is saved in time.

A residual sum, the merge after it and the norm that reads it are one operation, so a half of a block hands the next
one both its tokens and their norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tome_core.kernels import LARGEST_HEAD, add_norm, attend, linear_gelu, match, merge_add_norm, metric
from tome_core.kernels.side import beside


def reason_against(model: Any) -> str | None:
    """Why the blocks of a `VisionTransformer`, and the norm after them, cannot run fused; None where they can."""
    for i, block in enumerate(model.blocks):
        found = _unlike(block)
        if found:
            return f"block {i} {found}"
    if type(model.norm) is nn.Identity or _is_layer_norm(model.norm):
        return None
    return f"the final norm is a {type(model.norm).__name__}"


def has_hooks(blocks: Sequence[nn.Module]) -> bool:
    """Whether somebody listens to a layer inside a block, which would hear nothing of a fused one."""
    modules = (module for block in blocks for module in block.modules())
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _is_layer_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def _unlike(block: Any) -> str | None:
    """What sets a block apart from x + attention(norm(x)), then x + mlp(norm(x)); None if nothing does."""
    if type(block) is not Block:
        return f"is a {type(block).__name__}"
    if type(block.attn) is not Attention or type(block.mlp) is not Mlp:
        return f"is made of {type(block.attn).__name__} and {type(block.mlp).__name__}"
    attn, mlp = block.attn, block.mlp
    parts = [attn.q_norm, attn.k_norm, getattr(attn, "norm", nn.Identity()), mlp.norm]
    if any(type(part) is not nn.Identity for part in parts) or getattr(attn, "gate", None) is not None:
        return "has norms or gates inside attention or MLP"
    if not (_is_layer_norm(block.norm1) and _is_layer_norm(block.norm2)):
        return f"has a {type(block.norm1).__name__}, not LayerNorm with weight and bias"
    if type(mlp.act) is not nn.GELU or mlp.act.approximate != "none":
        return f"has the activation {mlp.act}"
    if any(type(linear) is not nn.Linear or linear.bias is None for linear in (attn.proj, mlp.fc1, mlp.fc2)):
        return "has projections that are not nn.Linear with a bias"
    if type(attn.qkv) is not nn.Linear or attn.qkv.out_features != 3 * attn.qkv.in_features:
        return "has no joint projection of queries, keys and values of the width of its tokens"
    if any(type(scale) not in (nn.Identity, LayerScale) for scale in (block.ls1, block.ls2)):
        return f"has a {type(block.ls1).__name__}"
    if attn.head_dim > LARGEST_HEAD or attn.head_dim % 8:
        return f"has heads of {attn.head_dim} channels; fused: multiples of 8 up to {LARGEST_HEAD}"
    return None


def run_blocks(
    model: Any, x: Tensor, schedule: Sequence[int], num_prefix_tokens: int, prefix_only: bool
) -> tuple[Tensor, Tensor | None]:
    """Tokens through all blocks and the norm after them.

    Args:
        model: A `VisionTransformer` that `reason_against` says nothing against.
        x: Tokens that enter the first, (B, N, C).
        schedule: `r` of each block, clipped.
        num_prefix_tokens: Leading tokens that never merge.
        prefix_only: Whether the last block is to compute prefix tokens alone, and merge nothing.

    Returns:
        Normalised tokens, (B, M, C), and their sizes, (B, M) float32, or None where nothing has merged.
    """
    blocks, size = model.blocks, None
    n = blocks[0].norm1(x)
    for i, (block, r) in enumerate(zip(blocks, schedule, strict=True)):
        last = i == len(blocks) - 1
        attn, scale = block.attn, _scale(block.ls1)
        q, k, v = _project(attn.qkv, n, num_prefix_tokens if last and prefix_only else None)
        args = (scale, block.norm2.weight, block.norm2.bias, block.norm2.eps)
        if last and prefix_only:
            y = attn.proj(attend(q, k, v, size, attn.num_heads))
            x, size = x[:, :num_prefix_tokens].contiguous(), None
            x, n = add_norm(x, y, *args)
        elif r:
            with beside(k.device) as join:  # matching needs the keys alone, so it runs while attention does
                groups = match(metric(k, attn.num_heads), r, num_prefix_tokens)
            y = attn.proj(attend(q, k, v, size, attn.num_heads))
            join()
            x, n, size = merge_add_norm(groups, x, y, size, *args)
        else:
            y = attn.proj(attend(q, k, v, size, attn.num_heads))
            x, n = add_norm(x, y, *args)
        y = block.mlp.fc2(linear_gelu(n, block.mlp.fc1.weight, block.mlp.fc1.bias))
        norm = model.norm if last else blocks[i + 1].norm1
        if type(norm) is nn.Identity:
            n = x + block.ls2(y)
        else:
            x, n = add_norm(x, y, _scale(block.ls2), norm.weight, norm.bias, norm.eps)
    return n, size


def _project(linear: nn.Linear, n: Tensor, num_queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (of the leading tokens), keys and values: views (B, N, C) of one joint product, or of two."""
    C = linear.in_features
    if num_queries is None:
        q, k, v = linear(n).split(C, dim=-1)
        return q, k, v
    weight, bias = linear.weight.split([C, 2 * C]), linear.bias.split([C, 2 * C]) if linear.bias is not None else None
    q = F.linear(n[:, :num_queries], weight[0], None if bias is None else bias[0])
    k, v = F.linear(n, weight[1], None if bias is None else bias[1]).split(C, dim=-1)
    return q, k, v


def _scale(layer: nn.Module) -> Tensor | None:
    return layer.gamma if isinstance(layer, LayerScale) else None
