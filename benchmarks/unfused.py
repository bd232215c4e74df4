"""The paper's maths in its usual form, in plain PyTorch: the baseline for the cost of merging without kernels.

Attention is a product, a softmax and a product; the merge is a scatter. The results equal those of `tome_core`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.variants import Variant
from tome_core.families.attention import heads
from tome_core.matching import MergePlan
from tome_core.positions import Position
from tome_core.tokens import Tokens


class Unfused(Variant):
    """Token merging with matrices in memory."""

    def _attend(self, block: Any, tokens: Tokens, position: Position, num_queries: int | None) -> tuple[Tensor, Tensor]:
        attn = block.attn
        q, k, v = (heads(t, attn.num_heads) for t in attn.qkv(block.norm1(tokens.x)).chunk(3, dim=-1))
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        if tokens.size is not None:
            scores = scores + tokens.size.log()[:, None, None, :].to(scores.dtype)
        y = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        x: Tensor = tokens.x + block.ls1(attn.proj(y))
        return x[:, :num_queries], k

    def metric(self, tokens: Tokens, keys: Tensor) -> Tensor:
        return keys.mean(dim=1)

    def combine(self, plan: MergePlan, tokens: Tokens) -> tuple[Tensor, Tensor]:
        x, size = tokens.x, tokens.size
        if size is None:
            size = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
        B, N, C = x.shape
        target = plan.target()
        total = size.new_zeros(B, N - plan.src.shape[1]).scatter_add(1, target, size)
        weighted = x * size[..., None].to(x.dtype)
        merged = x.new_zeros(B, total.shape[1], C).scatter_add(1, target[..., None].expand(-1, -1, C), weighted)
        return merged / total[..., None].to(x.dtype), total
