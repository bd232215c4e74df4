"""Bipartite soft matching on the device: one program an image, similarities by tensor cores, ranks by counting.

Counting how many come before is what a sort would find out, takes no order of its own, and needs one pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tome_core.kernels.groups import Groups


@triton.jit
def _metric(
    k, out, k_image, k_token, N,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the keys of BLOCK_N tokens, averaged over heads and scaled to length 1."""
    image = tl.program_id(1).to(tl.int64)
    rows, d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, D_PAD)
    inside = (rows[:, None] < N) & (d[None, :] < D)
    at = k + image * k_image + rows[:, None] * k_token + d[None, :]
    total = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    for head in range(H):
        total += tl.load(at + head * D, inside, 0.0).to(tl.float32)
    mean = total / H
    length = tl.sqrt(tl.sum(mean * mean, 1))
    mean = mean / tl.maximum(length, 1e-12)[:, None]
    tl.store(out + (image * N + rows[:, None]) * D + d[None, :], mean, inside)


def metric(k: Tensor, num_heads: int) -> Tensor:
    """As `reference.metric`; k may be a view of a joint projection, as long as channels are contiguous."""
    B, N, C = k.shape
    assert k.stride(2) == 1
    D, block = C // num_heads, 16
    out = torch.empty(B, N, D, dtype=torch.float32, device=k.device)
    _metric[(triton.cdiv(N, block), B)](
        k, out, k.stride(0), k.stride(1), N, num_heads, D, triton.next_power_of_2(D), block, num_warps=2
    )
    return out


@triton.jit
def _match(
    metric, best, partner, rank, keep, src, first,
    N, r, P, first_src, first_dst, S, T,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: all of an image's S src against its T dst. best, partner and rank, (B, S), are its notes."""
    image = tl.program_id(0).to(tl.int64)
    metric += image * N * D
    best += image * S
    partner += image * S
    rank += image * S
    keep += image * (N - r)
    src += image * r
    first += image * (N - r + 1)
    d = tl.arange(0, D_PAD)
    for begin in range(0, S, BLOCK_S):
        i = begin + tl.arange(0, BLOCK_S)
        features = metric + (first_src + 2 * i[:, None]) * D + d[None, :]
        features = tl.load(features, (i[:, None] < S) & (d[None, :] < D), 0.0)
        # What is not a number is similar to nothing: every src has a partner and a rank, whatever the model computes.
        similarity = tl.full([BLOCK_S], float("-inf"), tl.float32)
        closest = tl.zeros([BLOCK_S], tl.int32)
        for t0 in range(0, T, BLOCK):
            t = t0 + tl.arange(0, BLOCK)
            others = metric + (first_dst + 2 * t[None, :]) * D + d[:, None]
            others = tl.load(others, (t[None, :] < T) & (d[:, None] < D), 0.0)
            score = tl.dot(features, others, input_precision="tf32x3")
            score = tl.where((t[None, :] < T) & (score == score), score, float("-inf"))
            highest, where = tl.max(score, 1, return_indices=True)
            closest = tl.where(highest > similarity, t0 + where, closest)
            similarity = tl.maximum(highest, similarity)
        tl.store(best + i, similarity, i < S)
        tl.store(partner + i, closest, i < S)
    tl.debug_barrier()

    row = P  # of the next src that stays
    for begin in range(0, S, BLOCK_S):
        i = begin + tl.arange(0, BLOCK_S)
        similarity = tl.load(best + i, i < S, float("-inf"))
        place = tl.zeros([BLOCK_S], tl.int32)
        for j0 in range(0, S, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            other = tl.load(best + j, j < S, float("-inf"))[None, :]
            tied = (other == similarity[:, None]) & (j[None, :] < i[:, None])
            place += tl.sum((((other > similarity[:, None]) | tied) & (j[None, :] < S)).to(tl.int32), 1)
        tl.store(rank + i, place, i < S)
        stays = ((i < S) & (place >= r)).to(tl.int32)
        tl.store(keep + row + tl.cumsum(stays, 0) - stays, first_src + 2 * i, stays != 0)
        row += tl.sum(stays, 0)
    tl.debug_barrier()

    for begin in range(0, S, BLOCK_S):
        i = begin + tl.arange(0, BLOCK_S)
        merged = tl.load(rank + i, i < S, r) < r
        closest = tl.load(partner + i, i < S, 0)
        slot = tl.zeros([BLOCK_S], tl.int32)
        for j0 in range(0, S, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            other = tl.load(partner + j, j < S, 0)[None, :]
            tied = (other == closest[:, None]) & (j[None, :] < i[:, None])
            merges = tl.load(rank + j, j < S, r)[None, :] < r
            slot += tl.sum((((other < closest[:, None]) | tied) & merges).to(tl.int32), 1)
        tl.store(src + slot, first_src + 2 * i, merged)
    # Rows before the first dst have no members; the row behind the last begins where all of them are.
    for begin in range(0, row, BLOCK):
        prefix = begin + tl.arange(0, BLOCK)
        tl.store(keep + prefix, prefix, prefix < P)
        tl.store(first + prefix, tl.zeros([BLOCK], tl.int32), prefix < row)
    for begin in range(0, T + 1, BLOCK_S):
        t = begin + tl.arange(0, BLOCK_S)
        members = tl.zeros([BLOCK_S], tl.int32)
        for j0 in range(0, S, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            merges = tl.load(rank + j, j < S, r)[None, :] < r
            before = tl.load(partner + j, j < S, 0)[None, :] < t[:, None]
            members += tl.sum((before & merges).to(tl.int32), 1)
        tl.store(first + row + t, members, t <= T)
        tl.store(keep + row + t, first_dst + 2 * t, t < T)


def match(metric: Tensor, r: int, num_prefix_tokens: int) -> Groups:
    """As `reference.match`."""
    (B, N, D), P = metric.shape, num_prefix_tokens
    first_src, first_dst = P + P % 2, P + 1 - P % 2
    S, T = (N - first_src + 1) // 2, (N - first_dst + 1) // 2
    assert metric.is_contiguous() and metric.dtype == torch.float32 and 0 < r <= min(S, T)
    widths = (N - r, r, N - r + 1, S, S)
    keep, src, first, partner, rank = (metric.new_empty(B, width, dtype=torch.int32) for width in widths)
    best = metric.new_empty(B, S)
    _match[(B,)](
        metric, best, partner, rank, keep, src, first,
        N, r, P, first_src, first_dst, S, T,
        D, max(triton.next_power_of_2(D), 16), **blocks_of(S),
    )  # fmt: skip
    return Groups(keep, src, first)


def blocks_of(S: int) -> dict[str, int]:
    """How an image's work is cut for S src."""
    return {"BLOCK_S": min(max(triton.next_power_of_2(S), 16), 128), "BLOCK": 32, "num_warps": 4}
