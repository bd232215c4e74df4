"""The fused operations in plain PyTorch: the oracle of the kernels, and what runs where there are none."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tome_core.attention import proportional_attention
from tome_core.kernels.groups import Groups, groups_of, plan_of
from tome_core.matching import match as match_plan
from tome_core.merging import merge
from tome_core.precision import full_precision, widened


def attend(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, num_heads: int) -> Tensor:
    """Proportional attention over heads that lie side by side: softmax(q k^T / sqrt(D) + log s) v.

    Args:
        q: Queries, (B, M, C); C = num_heads * D.
        k: Keys, (B, N, C).
        v: Values, (B, N, C).
        size: Token sizes, (B, N) float32, or None for sizes of 1.
        num_heads: Heads.

    Returns:
        (B, M, C).

    Source: Bolya et al., Token Merging, ICLR 2023, equation 1.
    """
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return proportional_attention(q, k, v, size).transpose(1, 2).flatten(2)


def metric(k: Tensor, num_heads: int) -> Tensor:
    """What tokens are compared by: keys averaged over heads and scaled to length 1, (B, N, C) to (B, N, D) float32."""
    with full_precision(k.device):
        mean = widened(k).unflatten(-1, (num_heads, -1)).mean(dim=2)
        return F.normalize(mean, dim=-1)


def match(metric: Tensor, r: int, num_prefix_tokens: int) -> Groups:
    """Chooses the r most similar pairs; `tome_core.matching.match` says how, and r must fit.

    Args:
        metric: (B, N, D) float32, rows of length 1 or 0.
        r: Pairs to merge, 1 or more.
        num_prefix_tokens: Leading tokens that never merge.
    """
    return groups_of(match_plan(metric, r, num_prefix_tokens))


def add_norm(
    x: Tensor, y: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """A residual sum and the norm that reads it.

    Args:
        x: Tokens, (B, N, C); float32 keeps what a sum of many small terms loses in half precision.
        y: What a half of a block adds to them, (B, N, C).
        scale: LayerScale of y, (C,), or None for 1.
        weight: Of the norm, (C,).
        bias: Of the norm, (C,).
        eps: Of the norm.

    Returns:
        x + scale y in x's dtype, and its LayerNorm in y's; both (B, N, C).
    """
    total = widened(x) + _scaled(y, scale)
    return total.to(x.dtype), _norm(total, weight, bias, eps).to(y.dtype)


def merge_add_norm(
    groups: Groups,
    x: Tensor,
    y: Tensor,
    size: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A residual sum, the merge of its tokens into size-weighted means, and the norm that reads these.

    Args:
        groups: What merges, N tokens into M.
        size: Token sizes, (B, N) float32, or None for sizes of 1.
        x, y, scale, weight, bias, eps: As for `add_norm`.

    Returns:
        The merged tokens in x's dtype and their LayerNorm in y's, both (B, M, C); and their sizes, (B, M) float32.
    """
    total, merged_size = merge(plan_of(groups), widened(x) + _scaled(y, scale), size)
    return total.to(x.dtype), _norm(total, weight, bias, eps).to(y.dtype), merged_size


def _scaled(y: Tensor, scale: Tensor | None) -> Tensor:
    return widened(y) if scale is None else widened(y) * widened(scale)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    with full_precision(x.device):
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
