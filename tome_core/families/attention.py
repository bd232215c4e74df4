"""timm's attention layers with token sizes, positions of merged tokens, and only the required queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn

from tome_core.attention import proportional_attention
from tome_core.positions import Position


def attention(
    attn: Any, x: Tensor, size: Tensor | None, position: Position, num_queries: int | None
) -> tuple[Tensor, Tensor]:
    """A self-attention layer of any kind but differential: plain, rotary, EVA's, BEiT's, with relative positions.

    Args:
        attn: The timm layer.
        x: Its input, (B, N, C).
        size: Token sizes, (B, N) float32, or None for sizes of 1.
        position: Positions of the tokens.
        num_queries: Compute the output only for this many leading tokens; None means all.

    Returns:
        The output, (B, num_queries, C), and the keys before any rotation, (B, num_kv_heads, N, D).
    """
    num_kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
    q, k, v = project(attn, x, num_queries)
    q, k, v = heads(q, attn.num_heads), heads(k, num_kv_heads), heads(v, num_kv_heads)
    if hasattr(attn, "k_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    keys = k  # # unrotated: rotated keys of equal patches would differ
    if position.rope is not None:
        q, k = _rotate(attn, q, position.rope).type_as(v), _rotate(attn, k, position.rope).type_as(v)
    if k.shape[1] < q.shape[1]:  # grouped-query attention
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    y = proportional_attention(q, k, v, size, position.bias, attn.attn_drop.p if attn.training else 0.0)
    y = y.transpose(1, 2).flatten(2)
    if hasattr(attn, "norm"):
        y = attn.norm(y)
    if getattr(attn, "gate", None) is not None:
        y = y * attn.gate(x[:, :num_queries]).sigmoid()
    return attn.proj_drop(attn.proj(y)), keys


def diff_attention(
    attn: Any, x: Tensor, size: Tensor | None, position: Position, num_queries: int | None
) -> tuple[Tensor, Tensor]:
    """A differential attention layer; arguments and results as for `attention`, with 2 num_heads keys."""
    q, k, v = split(attn.qkv, x, [x.shape[-1]] * 3, num_queries)
    y, keys = difference(attn, q, k, v, size, position)
    return attn.proj_drop(attn.proj(attn.norm(y))), keys


def difference(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, position: Position
) -> tuple[Tensor, Tensor]:
    """The difference of two attentions over the same values, normalised.

    Args:
        attn: The layer or block with the norms and lambda.
        q: Queries, (B, num_queries, C); each head has two.
        k: Keys, (B, N, C).
        v: Values, (B, N, C).
        size: Token sizes, (B, N) float32, or None.
        position: Positions of the tokens.

    Returns:
        (B, num_queries, C), and the keys, (B, 2 num_heads, N, D).

    Source: Ye et al., Differential Transformer, 2024, equation 1.
    """
    q, k = (norm(heads(t, 2 * attn.num_heads)) for norm, t in ((attn.q_norm, q), (attn.k_norm, k)))
    v = heads(v, attn.num_heads)
    dropout = attn.attn_drop_p if attn.training else 0.0
    first, second = (proportional_attention(q[:, i::2], k[:, i::2], v, size, position.bias, dropout) for i in (0, 1))
    y = attn.sub_norm(first - attn._compute_lambda().type_as(q) * second)
    return (y * (1 - attn.lambda_init)).transpose(1, 2).flatten(2), k


def split(
    linear: Any, x: Tensor, widths: Sequence[int], num_queries: int | None, bias: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Splits a joint projection into its parts, the first of them only for the leading tokens.

    Args:
        linear: The projection, to sum(widths) features.
        x: (B, N, C).
        widths: Features of each part.
        num_queries: Leading tokens that get the first part; None means all.
        bias: The bias of each part, if the layer stores it outside `linear`.

    Returns:
        The first part, (B, num_queries, widths[0]), then the others, (B, N, width).
    """
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    if num_queries is None or type(linear) is not nn.Linear or hooked:
        y = linear(x) if bias is None else F.linear(x, linear.weight, torch.cat(tuple(bias)))
        first, *others = y.split(list(widths), dim=-1)
        return first[:, :num_queries], *others
    parts = [widths[0], sum(widths[1:])]
    weights, joint = linear.weight.split(parts), linear.bias if bias is None else torch.cat(tuple(bias))
    biases = (None, None) if joint is None else joint.split(parts)
    first = F.linear(x[:, :num_queries], weights[0], biases[0])
    return first, *F.linear(x, weights[1], biases[1]).split(list(widths[1:]), dim=-1)


def heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, num_heads D) -> (B, num_heads, N, D)."""
    split_heads: Tensor = x.unflatten(-1, (num_heads, -1))
    return split_heads.transpose(1, 2)


def project(attn: Any, x: Tensor, num_queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, num_queries, num_heads D), keys and values (B, N, num_kv_heads D)."""
    if getattr(attn, "q_proj", None) is not None:
        return attn.q_proj(x[:, :num_queries]), attn.k_proj(x), attn.v_proj(x)
    apart = _biases(attn)
    q, k, v = split(attn.qkv, x, [attn.qkv.out_features // 3] * 3, num_queries, apart)
    return q, k, v


def joint_bias(attn: Any) -> Tensor | None:
    """The bias of a joint projection, wherever the layer stores it, or None."""
    apart, own = _biases(attn), attn.qkv.bias
    return torch.cat(apart) if apart is not None else own


def _biases(attn: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """The biases of queries, keys and values, if the layer stores them outside the joint projection."""
    return (attn.q_bias, attn.k_bias, attn.v_bias) if getattr(attn, "q_bias", None) is not None else None


def _rotate(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    """Rotates all but the prefix tokens of x (B, num_heads, N, D), by sin and cos (..., N, 2D)."""
    prefix, patches = x[:, :, : attn.num_prefix_tokens], x[:, :, attn.num_prefix_tokens :]
    if not patches.shape[2]:  # # only prefix queries are required
        return prefix
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=getattr(attn, "rotate_half", False))], dim=2)
