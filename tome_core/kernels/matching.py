"""Bipartite soft matching on the device: similarities by tensor cores, ranks by counting.

Counting how many come before is what a sort would find out, takes no order of its own, and needs one pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tome_core.kernels.groups import Groups
from tome_core.kernels.launch import Kernel, ceil_div, power_of_2


@triton.jit(do_not_specialize=["N"])
def _metric(
    k, out, N,
    K_TOKEN: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the keys of BLOCK_N tokens, averaged over heads and scaled to length 1."""
    image = tl.program_id(1).to(tl.int64)
    rows, d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, D_PAD)
    inside = (rows[:, None] < N) & (d[None, :] < D)
    at = k + image * N * K_TOKEN + rows[:, None] * K_TOKEN + d[None, :]
    total = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    for head in range(H):
        total += tl.load(at + head * D, inside, 0.0).to(tl.float32)
    mean = total / H
    length = tl.sqrt(tl.sum(mean * mean, 1))
    mean = mean / tl.maximum(length, 1e-12)[:, None]
    tl.store(out + (image * N + rows[:, None]) * D + d[None, :], mean, inside)


def metric(k: Tensor, num_heads: int) -> Tensor:
    """As `reference.metric`."""
    B, N, C = k.shape
    D, block = C // num_heads, 16
    out = torch.empty(B, N, D, dtype=torch.float32, device=k.device)
    constants = (k.stride(1), num_heads, D, power_of_2(D), block)
    _launch_metric((ceil_div(N, block), B, 1), (k, out), (N,), constants, num_warps=2)
    return out


@triton.jit
def _propose(
    metric, best, partner, begin, first_src, first_dst, S, T,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_S src from `begin` on: the most similar dst, and how similar it is."""
    d, i = tl.arange(0, D_PAD), begin + tl.arange(0, BLOCK_S)
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


@triton.jit
def _count(best, rank, begin, S, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """The rank of BLOCK_S src from `begin` on: how many are more similar, or as similar and earlier."""
    i = begin + tl.arange(0, BLOCK_S)
    similarity = tl.load(best + i, i < S, float("-inf"))
    place = tl.zeros([BLOCK_S], tl.int32)
    for j0 in range(0, S, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        other = tl.load(best + j, j < S, float("-inf"))[None, :]
        tied = (other == similarity[:, None]) & (j[None, :] < i[:, None])
        place += tl.sum((((other > similarity[:, None]) | tied) & (j[None, :] < S)).to(tl.int32), 1)
    tl.store(rank + i, place, i < S)


@triton.jit
def _place(
    partner, rank, keep, src, first, begin, r, P, first_src, first_dst, S, T,
    BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes where BLOCK_S src and as many dst from `begin` on end: the rows that stay, their members, and how many."""
    i = begin + tl.arange(0, BLOCK_S)
    row = P + S - r  # of the first dst: behind prefix tokens and src that stay
    merged = tl.load(rank + i, i < S, r) < r
    closest = tl.load(partner + i, i < S, 0)
    slot = tl.zeros([BLOCK_S], tl.int32)
    merged_before = tl.zeros([BLOCK_S], tl.int32)
    members = tl.zeros([BLOCK_S], tl.int32)
    for j0 in range(0, S, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        merges = (tl.load(rank + j, j < S, r) < r)[None, :]
        other = tl.load(partner + j, j < S, 0)[None, :]
        earlier = j[None, :] < i[:, None]
        tied = (other == closest[:, None]) & earlier
        slot += tl.sum((((other < closest[:, None]) | tied) & merges).to(tl.int32), 1)
        merged_before += tl.sum((earlier & merges).to(tl.int32), 1)
        members += tl.sum(((other < i[:, None]) & merges).to(tl.int32), 1)
    tl.store(src + slot, first_src + 2 * i, merged)
    tl.store(keep + P + i - merged_before, first_src + 2 * i, (i < S) & (merged == 0))
    tl.store(first + row + i, members, i <= T)  # behind the last dst too: where all members are
    tl.store(keep + row + i, first_dst + 2 * i, i < T)
    # Rows before the first dst have no members.
    tl.store(keep + i, i, i < P)
    tl.store(first + i, tl.zeros([BLOCK_S], tl.int32), i < row)


@triton.jit(do_not_specialize=["N", "r", "P", "first_src", "first_dst", "S", "T"])
def _match(
    metric, best, partner, rank, keep, src, first,
    N, r, P, first_src, first_dst, S, T,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """An image's S src against its T dst; best, partner and rank, (B, S), are notes between the three stages.

    STAGE 0 is all of them by one program an image, which is enough where a block holds all src; 1, 2 and 3 are one
    each, by a program for every block of src.
    """
    image, begin = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_S
    metric += image * N * D
    best += image * S
    partner += image * S
    rank += image * S
    keep += image * (N - r)
    src += image * r
    first += image * (N - r + 1)
    if STAGE <= 1:
        _propose(metric, best, partner, begin, first_src, first_dst, S, T, D, D_PAD, BLOCK_S, BLOCK)
    if STAGE == 0:
        tl.debug_barrier()
    if STAGE == 0 or STAGE == 2:
        _count(best, rank, begin, S, BLOCK_S, BLOCK)
    if STAGE == 0:
        tl.debug_barrier()
    if STAGE == 0 or STAGE == 3:
        _place(partner, rank, keep, src, first, begin, r, P, first_src, first_dst, S, T, BLOCK_S, BLOCK)


def match(metric: Tensor, r: int, num_prefix_tokens: int) -> Groups:
    """As `reference.match`."""
    (B, N, D), P = metric.shape, num_prefix_tokens
    first_src, first_dst = P + P % 2, P + 1 - P % 2
    S, T = (N - first_src + 1) // 2, (N - first_dst + 1) // 2
    widths = (N - r, r, N - r + 1, S, S)
    keep, src, first, partner, rank = (metric.new_empty(B, width, dtype=torch.int32) for width in widths)
    best = metric.new_empty(B, S)
    written = max(P + S - r, T + 1)  # rows before the first dst, and dst: a block of src writes as many of each
    stages = (0,) if max(S, written) <= ONE_PROGRAM else (1, 2, 3)
    block = max(power_of_2(max(S, written)), 16) if stages == (0,) else SPREAD
    for stage in stages:
        _launch_match(
            (ceil_div(max(S, written), block), B, 1),
            (metric, best, partner, rank, keep, src, first),
            (N, r, P, first_src, first_dst, S, T),
            (D, max(power_of_2(D), 16), block, 32, stage),
            num_warps=4,
        )
    return Groups(keep, src, first)


_launch_metric, _launch_match = Kernel(_metric), Kernel(_match)

ONE_PROGRAM = 128
"""Most src of an image that one program matches: more would leave most of a GPU idle."""

SPREAD = 64
"""Src of a program where an image is spread over several."""
