"""Applies a merge plan: size-weighted means, token sizes, and the row of every input token.

It uses gathers and one small product with a one-hot matrix, but no scatter. So the result does not depend on the order
of additions on a device, and the same graph exports.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tome_core.matching import MergePlan
from tome_core.precision import full_precision, widened


def merge(plan: MergePlan, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merges tokens into their size-weighted mean.

    Args:
        plan: The merge of N tokens.
        x: Tokens, (B, N, C), any float dtype.
        size: Token sizes, (B, N) float32; None means sizes of 1.

    Returns:
        The merged tokens, (B, M, C) in x's dtype, and their sizes, (B, M) float32; the sum of sizes is kept.

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
        # # Weights of at most 1, in float32 or wider: summing first and dividing later would overflow float16.
        kept, lost = widened(gather_tokens(x, plan.keep)), widened(gather_tokens(x, plan.src))
        kept = kept * (kept_size / merged_size)[..., None]
        merged = torch.baddbmm(kept, (gains / merged_size[..., None]).to(kept.dtype), lost)
    return merged.to(x.dtype), merged_size


def track_source(plan: MergePlan, source: Tensor | None = None) -> Tensor:
    """Follows every original token to its current row.

    Args:
        plan: The last merge, of N tokens.
        source: The row of each original token before it, (B, N0) int64; None before the first merge (N0 = N).

    Returns:
        The row of each original token after it, (B, N0) int64.
    """
    target = plan.target()
    return target if source is None else target.gather(1, source)


def unmerge(x: Tensor, source: Tensor) -> Tensor:
    """Gives every original token the value of its current row: (B, M, C) and (B, N0) -> (B, N0, C)."""
    return gather_tokens(x, source)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x by position: (B, N, C) and (B, K) -> (B, K, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
