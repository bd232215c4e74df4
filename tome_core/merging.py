"""A merge plan applied: size-weighted means, token sizes, and where every input token went.

Gathers and one small product with a one-hot matrix, no scatter: the result does not depend on the order in which a
device adds, and the same graph exports.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tome_core.matching import MergePlan, full_precision, widened


def merge(plan: MergePlan, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merges tokens into their size-weighted mean.

    Args:
        plan: What merges with what, over N tokens.
        x: Tokens, (B, N, C), any float dtype.
        size: How many input tokens each stands for, (B, N) float32; None means one each.

    Returns:
        The merged tokens, (B, M, C) in x's dtype, and their sizes, (B, M) float32; sizes keep their sum.

    Source: Bolya et al., Token Merging, ICLR 2023, section 3, "Tracking Token Size".
    """
    if size is None:
        size = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
    rows = torch.arange(plan.keep.shape[1], device=x.device)
    with full_precision(x.device):
        joins = (plan.dst[:, None, :] == rows[:, None]).float()  # (B, M, r)
        gains = joins * size.gather(1, plan.src)[:, None, :]
        kept_size = size.gather(1, plan.keep)
        merged_size = kept_size + gains.sum(dim=-1)
        # Weights of at most 1, in float32 or wider: a sum first and a division later would overflow float16.
        kept, lost = widened(gather_tokens(x, plan.keep)), widened(gather_tokens(x, plan.src))
        kept = kept * (kept_size / merged_size)[..., None]
        merged = torch.baddbmm(kept, (gains / merged_size[..., None]).to(kept.dtype), lost)
    return merged.to(x.dtype), merged_size


def track_source(plan: MergePlan, source: Tensor | None = None) -> Tensor:
    """Follows every original token to the row that now holds it.

    Args:
        plan: The merge just made, over N tokens.
        source: Row of each original token before it, (B, N0) int64; None before the first merge (N0 = N).

    Returns:
        Row of each original token after it, (B, N0) int64.
    """
    target = plan.target()
    return target if source is None else target.gather(1, source)


def unmerge(x: Tensor, source: Tensor) -> Tensor:
    """Gives every original token the value of the token that holds it now: (B, M, C) and (B, N0) -> (B, N0, C)."""
    return gather_tokens(x, source)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x by position: (B, N, C) and (B, K) -> (B, K, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
