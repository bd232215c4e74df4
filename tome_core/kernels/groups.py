"""The members of each output row of a merge: the plan of `tome_core.matching` in the kernels' form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tome_core.matching import MergePlan


class Groups(NamedTuple):
    """One merge of N tokens into M = N - r rows; row m is `keep[m]` and `src[first[m] : first[m + 1]]`.

    To read the members of a row needs no scatter and no search, and they are always summed in one order.

    Attributes:
        keep: First token of each row, (B, M) int32: prefix tokens, unmerged src, then every dst.
        src: Tokens merged away, (B, r) int32, by row and then by position.
        first: Start of each row's members in `src`, then `r`, (B, M + 1) int32.
    """

    keep: Tensor
    src: Tensor
    first: Tensor


def groups_of(plan: MergePlan) -> Groups:
    """Converts a plan to groups in the order of its rows."""
    num_rows, N = plan.keep.shape[1], plan.keep.shape[1] + plan.src.shape[1]
    order = (plan.dst * N + plan.src).argsort(dim=1)
    dst = plan.dst.gather(1, order).contiguous()
    rows = torch.arange(num_rows + 1, device=dst.device).expand(dst.shape[0], -1).contiguous()
    first = torch.searchsorted(dst, rows)
    return Groups(plan.keep.int(), plan.src.gather(1, order).int(), first.int())


def plan_of(groups: Groups) -> MergePlan:
    """Converts groups to a plan, its pairs in the order of their rows."""
    slots = torch.arange(groups.src.shape[1], device=groups.src.device).expand_as(groups.src).contiguous()
    dst = torch.searchsorted(groups.first.long(), slots, right=True) - 1
    return MergePlan(groups.keep.long(), groups.src.long(), dst)
