"""Rotary embedding of queries and keys, and the metric of the keys before it, in one pass over the joint projection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tome_core.kernels.launch import Kernel, ceil_div, power_of_2


@triton.jit
def _pairs(values, HALVED: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr):
    """(ROWS, H * 2 HALF) as the two members of each rotated pair, both (ROWS, H, HALF)."""
    if HALVED:
        return tl.split(tl.permute(tl.reshape(values, (ROWS, H, 2, HALF)), (0, 1, 3, 2)))
    return tl.split(tl.reshape(values, (ROWS, H, HALF, 2)))


@triton.jit
def _joined(first, second, HALVED: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr):
    """The reverse of `_pairs`."""
    both = tl.join(first, second)
    if HALVED:
        both = tl.permute(both, (0, 1, 3, 2))
    return tl.reshape(both, (ROWS, H * 2 * HALF))


@triton.jit(do_not_specialize=["table_image", "M", "N"])
def _rotate(
    q, k, table, size, q_out, k_out, metric,
    table_image, M, N,
    Q_TOKEN: tl.constexpr, K_TOKEN: tl.constexpr,
    H: tl.constexpr, H_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
    SHARED: tl.constexpr, HALVED: tl.constexpr, SIZED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of an image, all heads at once."""
    image = tl.program_id(1).to(tl.int64)
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, H_PAD * D_PAD)
    head, d = c // D_PAD, c % D_PAD
    HALF: tl.constexpr = D_PAD // 2
    if HALVED:  # each half of a head has its own padding
        d = tl.where(d < HALF, d, d - HALF + D // 2)
        real = (head < H) & (c % HALF < D // 2)
    else:
        real = (head < H) & (d < D)
    inside, asked = (row[:, None] < N) & real[None, :], (row[:, None] < M) & real[None, :]
    at = row[:, None] * Q_TOKEN + (head * D + d)[None, :]
    query = tl.load(q + image * M * Q_TOKEN + at, asked, 0.0).to(tl.float32)
    at = row[:, None] * K_TOKEN + (head * D + d)[None, :]
    key = tl.load(k + image * N * K_TOKEN + at, inside, 0.0).to(tl.float32)
    if SHARED:
        c_turn = tl.arange(0, D_PAD)
        d_turn = tl.where(c_turn < HALF, c_turn, c_turn - HALF + D // 2) if HALVED else c_turn
        real_turn = c_turn % HALF < D // 2 if HALVED else c_turn < D
        turns = table + (image * table_image + row[:, None]) * (2 * D) + d_turn[None, :]
        known = (row[:, None] < N) & real_turn[None, :]
        sine = _pairs(tl.load(turns, known, 0.0).to(tl.float32), HALVED, ROWS, 1, HALF)
        cosine = _pairs(tl.load(turns + D, known, 0.0).to(tl.float32), HALVED, ROWS, 1, HALF)
    else:
        turns = table + ((image * table_image + row[:, None]) * H + head[None, :]) * (2 * D) + d[None, :]
        sine = _pairs(tl.load(turns, inside, 0.0).to(tl.float32), HALVED, ROWS, H_PAD, HALF)
        cosine = _pairs(tl.load(turns + D, inside, 0.0).to(tl.float32), HALVED, ROWS, H_PAD, HALF)
    sin_first, sin_second = sine
    cos_first, cos_second = cosine
    if SIZED:
        share = (1.0 / tl.load(size + image * N + row, row < N, 1.0))[:, None, None]
        sin_first, sin_second, cos_first, cos_second = (
            sin_first * share, sin_second * share, cos_first * share, cos_second * share,
        )  # fmt: skip
    first, second = _pairs(query, HALVED, ROWS, H_PAD, HALF)
    query = _joined(
        first * cos_first - second * sin_first, second * cos_second + first * sin_second, HALVED, ROWS, H_PAD, HALF
    )
    at = (image * M + row[:, None]) * (H * D) + (head * D + d)[None, :]
    tl.store(q_out + at, query.to(q_out.dtype.element_ty), asked)
    first, second = _pairs(key, HALVED, ROWS, H_PAD, HALF)
    turned = _joined(
        first * cos_first - second * sin_first, second * cos_second + first * sin_second, HALVED, ROWS, H_PAD, HALF
    )
    at = (image * N + row[:, None]) * (H * D) + (head * D + d)[None, :]
    tl.store(k_out + at, turned.to(k_out.dtype.element_ty), inside)
    mean = tl.sum(tl.reshape(key, (ROWS, H_PAD, D_PAD)), 1) / H
    length = tl.sqrt(tl.sum(mean * mean, 1))
    mean = mean / tl.maximum(length, 1e-12)[:, None]
    channel = tl.arange(0, D_PAD)
    if HALVED:
        stored = channel % HALF < D // 2
        channel = tl.where(channel < HALF, channel, channel - HALF + D // 2)
    else:
        stored = channel < D
    at = (image * N + row[:, None]) * D + channel[None, :]
    tl.store(metric + at, mean, (row[:, None] < N) & stored[None, :])


def rotate(
    q: Tensor, k: Tensor, table: Tensor, size: Tensor | None, num_heads: int, halved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.rotate`."""
    (B, M, C), N = q.shape, k.shape[1]
    D = C // num_heads
    padded = [power_of_2(n) for n in (num_heads, D)]
    q_out, k_out = (torch.empty(B, n, C, dtype=q.dtype, device=q.device) for n in (M, N))
    metric = torch.empty(B, N, D, dtype=torch.float32, device=q.device)
    rows = max(2048 // (padded[0] * padded[1]), 1)
    _launch(
        (ceil_div(N, rows), B, 1),
        (q, k, table, size, q_out, k_out, metric),
        (N if len(table) > 1 else 0, M, N),
        (
            q.stride(1), k.stride(1), num_heads, padded[0], D, padded[1], rows,
            table.shape[2] == 2 * D, halved, size is not None,
        ),
        num_warps=4,
    )  # fmt: skip
    return q_out, k_out, metric


_launch = Kernel(_rotate)
