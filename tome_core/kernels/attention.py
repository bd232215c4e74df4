"""Proportional attention in one pass over keys and values, heads side by side as the joint projection leaves them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tome_core.kernels.launch import Kernel, ceil_div, power_of_2, widen_products
from tome_core.kernels.relative import LOG2_E, Bias

FEW_QUERIES = 16
"""Queries up to which a program takes them all; more, without sizes and biases, are left to torch's attention."""


@triton.jit(do_not_specialize=["M", "N", "num_codes", "scale", "multiplier"])
def _attend(
    q, k, v, log_size, table, row_code, column_code, out,
    M, N, num_codes, scale, multiplier,
    Q_TOKEN: tl.constexpr, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr,
    D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_TILE: tl.constexpr, SIZED: tl.constexpr, BIASED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of a head of an image against all of its keys, by a softmax in base 2.

    A head of D channels is computed as LOW, a power of two, and HIGH more, which may be 0: padding 72 channels to 128
    would double the work. Only the last tile of keys is masked.
    """
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, low, high = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, LOW), LOW + tl.arange(0, HIGH)
    q += image * M * Q_TOKEN + head * D
    k += image * N * K_TOKEN + head * D
    v += image * N * V_TOKEN + head * D
    inside = rows[:, None] < M
    queries = tl.load(q + rows[:, None] * Q_TOKEN + low[None, :], inside, 0.0)
    queries_high = queries
    if HIGH > 1:
        queries_high = tl.load(q + rows[:, None] * Q_TOKEN + high[None, :], inside & (high[None, :] < D), 0.0)
    if WIDEN:
        queries, queries_high = queries.to(tl.float32), queries_high.to(tl.float32)
    codes = rows
    if SIZED:
        log_size += image * N
    if BIASED:
        table += head * num_codes
        column_code += image * N
        codes = tl.load(row_code + image * N + rows, rows < M, 0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, LOW], tl.float32)
    acc_high = tl.zeros([BLOCK_M, HIGH], tl.float32)
    whole = 0 if ONE_TILE else N // BLOCK_N * BLOCK_N
    if not ONE_TILE:
        for begin in range(0, whole, BLOCK_N):
            highest, total, acc, acc_high = _tile(
                queries, queries_high, k, v, log_size, table, codes, column_code, begin, N, scale,
                highest, total, acc, acc_high, K_TOKEN, V_TOKEN, D, LOW, HIGH, BLOCK_N, False, SIZED, BIASED, WIDEN,
            )  # fmt: skip
    if ONE_TILE or whole < N:
        highest, total, acc, acc_high = _tile(
            queries, queries_high, k, v, log_size, table, codes, column_code, whole, N, scale,
            highest, total, acc, acc_high, K_TOKEN, V_TOKEN, D, LOW, HIGH, BLOCK_N, True, SIZED, BIASED, WIDEN,
        )  # fmt: skip
    share = multiplier / total[:, None]
    out += (image * M + rows[:, None]) * (tl.num_programs(1) * D) + head * D
    tl.store(out + low[None, :], (acc * share).to(out.dtype.element_ty), inside)
    if HIGH > 1:
        tl.store(out + high[None, :], (acc_high * share).to(out.dtype.element_ty), inside & (high[None, :] < D))


@triton.jit
def _tile(
    queries, queries_high, k, v, log_size, table, codes, column_code, begin, N, scale,
    highest, total, acc, acc_high,
    K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, SIZED: tl.constexpr, BIASED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: BLOCK_N keys and values from `begin` on."""
    columns, low, high = begin + tl.arange(0, BLOCK_N), tl.arange(0, LOW), LOW + tl.arange(0, HIGH)
    at_k, at_v = k + columns[None, :] * K_TOKEN, v + columns[:, None] * V_TOKEN
    if MASKED:
        keys = tl.load(at_k + low[:, None], columns[None, :] < N, 0.0)
        values = tl.load(at_v + low[None, :], columns[:, None] < N, 0.0)
    else:
        keys, values = tl.load(at_k + low[:, None]), tl.load(at_v + low[None, :])
    if WIDEN:
        keys, values = keys.to(tl.float32), values.to(tl.float32)
    score = tl.dot(queries, keys, input_precision="tf32x3")
    if HIGH > 1:
        keys_high = tl.load(at_k + high[:, None], (columns[None, :] < N) & (high[:, None] < D), 0.0)
        if WIDEN:
            keys_high = keys_high.to(tl.float32)
        score = tl.dot(queries_high, keys_high, score, input_precision="tf32x3")
    score = score * scale
    if SIZED:
        score += tl.load(log_size + columns, columns < N, 0.0)[None, :]
    if BIASED:
        score += tl.load(table + codes[:, None] + tl.load(column_code + columns, columns < N, 0)[None, :])
    if MASKED:
        score = tl.where(columns[None, :] < N, score, float("-inf"))
    higher = tl.maximum(highest, tl.max(score, 1))
    weight = tl.exp2(score - higher[:, None])
    shrink = tl.exp2(highest - higher)
    total = total * shrink + tl.sum(weight, 1)
    weight = weight.to(values.dtype)
    acc = tl.dot(weight, values, acc * shrink[:, None], input_precision="tf32x3")
    if HIGH > 1:
        values_high = tl.load(at_v + high[None, :], (columns[:, None] < N) & (high[None, :] < D), 0.0)
        if WIDEN:
            values_high = values_high.to(tl.float32)
        acc_high = tl.dot(weight, values_high, acc_high * shrink[:, None], input_precision="tf32x3")
    return higher, total, acc, acc_high


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    bias: Bias | None,
    num_heads: int,
    dtype: torch.dtype,
    multiplier: float,
) -> Tensor:
    """As `reference.attend`."""
    (B, M, C), N = q.shape, k.shape[1]
    if log_size is None and bias is None and M > FEW_QUERIES and dtype == q.dtype and multiplier == 1:
        q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out = torch.empty(B, M, C, dtype=dtype, device=q.device)
    D = C // num_heads
    low, high = halves_of(D)
    cut = blocks_of(M, N, D, q.dtype, bias is not None)
    _launch(
        (ceil_div(M, cut.block_m), num_heads, B),
        (q, k, v, log_size, *(bias or (None, None, None)), out),
        (M, N, 0 if bias is None else bias.table.shape[1], D**-0.5 * LOG2_E, multiplier),
        (
            q.stride(1), k.stride(1), v.stride(1), D, low, high, cut.block_m, cut.block_n, cut.block_n >= N,
            log_size is not None, bias is not None, widen_products(q),
        ),
        cut.num_warps,
        cut.num_stages,
    )  # fmt: skip
    return out


_launch = Kernel(_attend)


def halves_of(D: int) -> tuple[int, int]:
    """Channels of a head as a power of two and what is left, padded to a width that products take (1 for none)."""
    low = 1 << (D.bit_length() - 1)
    return (low, 1) if low == D else (low, max(power_of_2(D - low), 16))


class Cut(NamedTuple):
    """How the work is cut: queries of a program, keys of a step, warps of a program, steps that it loads ahead."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def blocks_of(M: int, N: int, D: int, dtype: torch.dtype, biased: bool) -> Cut:
    """The cut for M queries and N keys: the best of a sweep on an H100 (docs/performance.md)."""
    if dtype == torch.float32:
        return Cut(64 if M > FEW_QUERIES else 16, 32, 4, 2)
    if M <= FEW_QUERIES:
        return Cut(16, 64, 2, 3)
    if N <= 128 and D <= 64:  # all keys in one tile
        return Cut(64, 64 if N <= 64 else 128, 4, 1)
    if biased:
        return Cut(64, 128 if D == 64 else 32, 4, 1)
    return Cut(64, 128 if N > 256 and D == 64 else 32, 4, 2)
