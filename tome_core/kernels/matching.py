"""Bipartite soft matching on the device: similarities by tensor cores, ranks by counting.

Counting the predecessors gives the rank without a sort, in one pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tome_core.kernels.groups import Groups
from tome_core.kernels.launch import Kernel, ceil_div, power_of_2


@triton.jit
def _compare(
    k, metric, begin, N, H,
    K_TOKEN: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The metric of BLOCK tokens from `begin` on: their keys, averaged over heads and scaled to length 1."""
    rows, d = begin + tl.arange(0, BLOCK), tl.arange(0, D_PAD)
    inside = (rows[:, None] < N) & (d[None, :] < D)
    at = k + rows[:, None] * K_TOKEN + d[None, :]
    total = tl.zeros([BLOCK, D_PAD], tl.float32)
    for head in range(H):
        total += tl.load(at + head * D, inside, 0.0).to(tl.float32)
    mean = total / H
    length = tl.sqrt(tl.sum(mean * mean, 1))
    mean = mean / tl.maximum(length, 1e-12)[:, None]
    tl.store(metric + rows[:, None] * D + d[None, :], mean, inside)


@triton.jit
def _propose(
    metric, best, partner, begin, first_src, first_dst, S, T,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For BLOCK_S src from `begin` on: the most similar dst, and its similarity."""
    d, i = tl.arange(0, D_PAD), begin + tl.arange(0, BLOCK_S)
    features = metric + (first_src + 2 * i[:, None]) * D + d[None, :]
    features = tl.load(features, (i[:, None] < S) & (d[None, :] < D), 0.0)
    # NaN is similar to nothing. So every src has a partner and a rank, whatever the model computes.
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
    """The rank of BLOCK_S src from `begin` on: the number of src that are more similar, or as similar and earlier."""
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
    """Writes the output places of BLOCK_S src and as many dst from `begin` on: the rows that stay, and their
    members.
    """
    i = begin + tl.arange(0, BLOCK_S)
    row = P + S - r  # of the first dst: after prefix tokens and src that stay
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
    tl.store(first + row + i, members, i <= T)  # also after the last dst: the number of all members
    tl.store(keep + row + i, first_dst + 2 * i, i < T)
    # Rows before the first dst have no members.
    tl.store(keep + i, i, i < P)
    tl.store(first + i, tl.zeros([BLOCK_S], tl.int32), i < row)


@triton.jit
def _match_image(
    k, metric, best, partner, rank, keep, src, first, image,
    N, H, r, P, first_src, first_dst, S, T, written,
    K_TOKEN: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    """A whole image by one program. With COMPARED its metric already exists."""
    metric += image * N * D
    best += image * S
    partner += image * S
    rank += image * S
    keep += image * (N - r)
    src += image * r
    first += image * (N - r + 1)
    if not COMPARED:
        for begin in range(0, N, 32):
            _compare(k + image * N * K_TOKEN, metric, begin, N, H, K_TOKEN, D, D_PAD, 32)
        tl.debug_barrier()
    for begin in range(0, S, 64):
        _propose(metric, best, partner, begin, first_src, first_dst, S, T, D, D_PAD, 64, 32)
    tl.debug_barrier()
    for begin in range(0, S, 64):
        _count(best, rank, begin, S, 64, 32)
    tl.debug_barrier()
    for begin in range(0, written, 64):
        _place(partner, rank, keep, src, first, begin, r, P, first_src, first_dst, S, T, 64, 32)


@triton.jit(do_not_specialize=["N", "H"])
def _metric(
    k, out, N, H,
    K_TOKEN: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK tokens of an image."""
    image = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * BLOCK
    _compare(k + image * N * K_TOKEN, out + image * N * D, begin, N, H, K_TOKEN, D, D_PAD, BLOCK)


@triton.jit(do_not_specialize=["N", "r", "P", "first_src", "first_dst", "S", "T"])
def _match(
    metric, best, partner, rank, keep, src, first,
    N, r, P, first_src, first_dst, S, T,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """One program: a stage of matching for BLOCK_S src of an image, and as many dst.

    best, partner and rank, (B, S), are scratch memory between the stages.
    """
    image, begin = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_S
    metric += image * N * D
    best += image * S
    partner += image * S
    rank += image * S
    if STAGE == 0:
        _propose(metric, best, partner, begin, first_src, first_dst, S, T, D, D_PAD, BLOCK_S, BLOCK)
    elif STAGE == 1:
        _count(best, rank, begin, S, BLOCK_S, BLOCK)
    else:
        keep += image * (N - r)
        src += image * r
        first += image * (N - r + 1)
        _place(partner, rank, keep, src, first, begin, r, P, first_src, first_dst, S, T, BLOCK_S, BLOCK)


@triton.jit(do_not_specialize=["N", "r", "P", "first_src", "first_dst", "S", "T", "written"])
def _match_whole(
    metric, best, partner, rank, keep, src, first,
    N, r, P, first_src, first_dst, S, T, written,
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """One program: a whole image."""
    image = tl.program_id(0).to(tl.int64)
    _match_image(
        metric, metric, best, partner, rank, keep, src, first, image,
        N, 1, r, P, first_src, first_dst, S, T, written, 1, D, D_PAD, True,
    )  # fmt: skip


def metric(k: Tensor, num_heads: int) -> Tensor:
    """See `reference.metric`."""
    B, N, C = k.shape
    D = C // num_heads
    out = torch.empty(B, N, D, dtype=torch.float32, device=k.device)
    constants = (k.stride(1), D, power_of_2(D), BLOCK)
    _launch_metric((ceil_div(N, BLOCK), B, 1), (k, out), (N, num_heads), constants, num_warps=2)
    return out


def match(metric: Tensor, r: int, num_prefix_tokens: int) -> Groups:
    """See `reference.match`."""
    B, N, D = metric.shape
    halves = halves_of(N, num_prefix_tokens)
    groups, notes = empty_groups(B, N, r, halves, metric.device)
    tensors, numbers = (metric, *notes, *groups), (N, r, num_prefix_tokens, *halves)
    written, constants = halves.written(r, num_prefix_tokens), (D, max(power_of_2(D), 16))
    if written <= FEW_SRC and B >= MANY_IMAGES:
        _launch_whole((B, 1, 1), tensors, (*numbers, written), constants, num_warps=4)
        return groups
    for stage in range(3):
        _launch_match(
            (ceil_div(written, BLOCK_S), B, 1), tensors, numbers, (*constants, BLOCK_S, BLOCK_T, stage), num_warps=4
        )
    return groups


BLOCK = 16
"""Tokens of a program that computes the metric."""

BLOCK_S, BLOCK_T = 64, 32
"""Src of a program, and dst of one of its steps."""

FEW_SRC, MANY_IMAGES = 128, 64
"""Most src of an image, and fewest images, for one program an image. Otherwise an image is spread over several
programs.
"""

_launch_metric, _launch_match, _launch_whole = Kernel(_metric), Kernel(_match), Kernel(_match_whole)


class Halves(NamedTuple):
    """The two halves of the tokens that may merge: the first src and dst, and the number of each."""

    first_src: int
    first_dst: int
    S: int
    T: int

    def written(self, r: int, num_prefix_tokens: int) -> int:
        """Number of rows that `_place` must reach: those before the first dst, and dst."""
        return max(self.S, num_prefix_tokens + self.S - r, self.T + 1)


def halves_of(N: int, P: int) -> Halves:
    """Src and dst of N tokens with P prefix tokens: alternate tokens, by the parity of the whole sequence."""
    first_src, first_dst = P + P % 2, P + 1 - P % 2
    return Halves(first_src, first_dst, (N - first_src + 1) // 2, (N - first_dst + 1) // 2)


def empty_groups(B: int, N: int, r: int, halves: Halves, device: torch.device) -> tuple[Groups, tuple[Tensor, ...]]:
    """The outputs of matching: the groups, and its scratch memory best, partner and rank."""
    keep, src, first, partner, rank = (
        torch.empty(B, width, dtype=torch.int32, device=device) for width in (N - r, r, N - r + 1, halves.S, halves.S)
    )
    best = torch.empty(B, halves.S, dtype=torch.float32, device=device)
    return Groups(keep, src, first), (best, partner, rank)
