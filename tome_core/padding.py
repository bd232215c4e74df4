"""Matching in a batch of images with padding after their patches. Each image merges as it would alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_core.matching import MergePlan, first_of_sides
from tome_core.precision import full_precision, widened


def match_padded(metric: Tensor, size: Tensor, r: int, num_prefix_tokens: int) -> MergePlan:
    """Chooses the tokens that merge in each image, as `match` does for the image without its padding.

    An image with fewer than 2r patches merges half of them, and padding leaves instead of the rest. So r tokens leave
    every image, and the batch stays a rectangle. The remaining padding stays behind the patches.

    Args:
        metric: Features compared, (B, N, D), any float dtype.
        size: Token sizes, (B, N); below 1 for padding.
        r: Tokens that leave each image; at most half of its N - num_prefix_tokens.
        num_prefix_tokens: Leading tokens, which never merge and are not padding.

    Returns:
        The plan. Padding that leaves joins the first token, and does not change its mean.
    """
    B, N, _ = metric.shape
    P, device = num_prefix_tokens, metric.device
    positions, valid = torch.arange(N, device=device).expand(B, N), size >= 1
    first_src, first_dst = first_of_sides(P)
    with full_precision(device):
        metric = F.normalize(widened(metric), dim=-1)
        similarity = metric[:, first_src::2] @ metric[:, first_dst::2].transpose(1, 2)
    pairs = valid[:, first_src::2, None] & valid[:, None, first_dst::2]
    best, partner = similarity.masked_fill(~pairs, -torch.inf).max(dim=-1)  # (B, N_src)
    rank = best.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    most = torch.minimum(valid[:, P:].sum(dim=1) // 2, pairs.any(dim=2).sum(dim=1)).clamp(max=r)
    # The order of rows: prefix, unmerged src, dst, padding; then src that merge. The last r rows leave.
    place = torch.full((B, N), 2, device=device)
    place[:, :P] = 0
    place[:, first_src::2] = 1
    place = torch.where(valid, place, 3)
    place[:, first_src::2] = torch.where(rank < most[:, None], 4, place[:, first_src::2])
    order = (place * N + positions).argsort(dim=1)
    keep, src = order[:, : N - r], order[:, N - r :]
    joined = torch.zeros_like(positions)
    joined[:, first_src::2] = first_dst + 2 * partner
    row = order.argsort(dim=1).gather(1, joined.gather(1, src))
    return MergePlan(keep, src, torch.where(place.gather(1, src) == 4, row, 0))
