"""Proportional attention: a token of size s counts as s tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def size_bias(size: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The additive attention mask log s, (B, 1, 1, N), for any attention that takes a float mask; None for sizes of 1.

    Attention with it equals attention over keys and values repeated s times.

    Source: Bolya et al., Token Merging, ICLR 2023, equation 1.
    """
    return None if size is None else size.log()[:, None, None, :].to(dtype)


def proportional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + log s + bias) v.

    Args:
        q: Queries of the leading M tokens, (B, num_heads, M, D).
        k: Keys, (B, num_heads, N, D).
        v: Values, (B, num_heads, N, D).
        size: Size s of each key's token, (B, N) float32; None means sizes of 1, which is plain attention.
        bias: Relative position bias, (1 or B, num_heads, N, N), or None.
        dropout: Probability of dropping an attention weight.

    Returns:
        (B, num_heads, M, D) in q's dtype.

    Source: Bolya et al., Token Merging, ICLR 2023, equation 1.
    """
    mask = size_bias(size, q.dtype)
    if bias is not None:
        bias = bias[:, :, : q.shape[2]].to(q.dtype)
        mask = bias if mask is None else mask + bias
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
