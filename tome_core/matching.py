"""Which tokens merge: bipartite soft matching on a metric, as index tensors for any device and dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_core.precision import full_precision, widened
from tome_core.schedule import max_r


class MergePlan(NamedTuple):
    """One merge of N tokens into M = N - r, for each image of a batch.

    Attributes:
        keep: The token at the head of each output row, (B, M) int64: prefix tokens, unmerged src, then every dst.
        src: Tokens merged away, (B, r) int64.
        dst: The output row that each token of `src` joins, (B, r) int64.
    """

    keep: Tensor
    src: Tensor
    dst: Tensor

    def target(self) -> Tensor:
        """The output row of every input token, (B, N) int64."""
        rows = torch.arange(self.keep.shape[1], device=self.keep.device).expand_as(self.keep)
        # keep and src together are a permutation of the input; sorting it inverts it without a scatter.
        inverse = torch.cat([self.keep, self.src], dim=1).argsort(dim=1)
        return torch.cat([rows, self.dst], dim=1).gather(1, inverse)


def first_of_sides(num_prefix_tokens: int) -> tuple[int, int]:
    """The positions of the first src and of the first dst; both sides take every second token from there.

    Parity counts from the start of the sequence, so a class token shifts patches as in the paper.
    """
    return num_prefix_tokens + num_prefix_tokens % 2, num_prefix_tokens + 1 - num_prefix_tokens % 2


def match(metric: Tensor, r: int, num_prefix_tokens: int = 0) -> MergePlan:
    """Chooses the r most similar token pairs to merge.

    Tokens alternate between src (even positions) and dst (odd positions). Each src proposes its most similar dst by
    cosine similarity, and the r best proposals win; ties go to the earlier token. Prefix tokens take no part. A metric
    of zero norm has similarity 0 to everything, never NaN.

    Args:
        metric: Features to compare, (B, N, D), any float dtype; compared in float32 or wider.
        r: Pairs to merge. Clipped to half of the mergeable tokens; 0 gives the identity plan.
        num_prefix_tokens: Leading tokens that never merge (class, distillation, registers).

    Returns:
        The plan, on metric's device.

    Raises:
        ValueError: r is negative, or metric is not three-dimensional.

    Source: Bolya et al., Token Merging, ICLR 2023, section 3, "Bipartite Soft Matching".
    """
    if metric.ndim != 3:
        raise ValueError(f"metric has shape {tuple(metric.shape)}; it must be (B, N, D)")
    if r < 0:
        raise ValueError(f"r is {r}; it must be 0 or more")
    B, N, _ = metric.shape
    r = min(r, max_r(N, num_prefix_tokens))
    positions = torch.arange(N, device=metric.device).expand(B, N)
    if r == 0:
        return MergePlan(positions, positions[:, :0], positions[:, :0])

    first_src, first_dst = first_of_sides(num_prefix_tokens)
    with full_precision(metric.device):
        metric = F.normalize(widened(metric), dim=-1)
        similarity = metric[:, first_src::2] @ metric[:, first_dst::2].transpose(1, 2)  # (B, N_src, N_dst)
    best, partner = similarity.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged, unmerged = order[:, :r], order[:, r:].sort(dim=-1).values
    keep = torch.cat([positions[:, :num_prefix_tokens], first_src + 2 * unmerged, positions[:, first_dst::2]], dim=1)
    first_dst_row = num_prefix_tokens + unmerged.shape[1]
    return MergePlan(keep, first_src + 2 * merged, first_dst_row + partner.gather(1, merged))
