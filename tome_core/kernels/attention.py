"""Proportional attention in one pass over keys and values. Heads lie side by side, as in the joint projection."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tome_core.kernels import matching
from tome_core.kernels.groups import Groups
from tome_core.kernels.launch import Kernel, ceil_div, power_of_2, widen_products
from tome_core.kernels.matching import _match_image
from tome_core.kernels.relative import LOG2_E, Bias
from tome_core.kernels.side import beside, is_recorded

FEW_QUERIES = 16
"""Most queries that one program takes. More queries, without sizes and biases, use torch's attention."""


@triton.jit
def _attend_rows(
    q, k, v, log_size, table, row_code, column_code, out, image, head, begin,
    M, N, H, num_codes, scale,
    Q_TOKEN: tl.constexpr, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr,
    SIZED: tl.constexpr, BIASED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of a head of an image against all of its keys, by a softmax in base 2.

    Only the last tile of keys is masked, and channels only if D is not a power of two.
    """
    rows, d = begin + tl.arange(0, BLOCK_M), tl.arange(0, D_PAD)
    q += image * M * Q_TOKEN + head * D
    k += image * N * K_TOKEN + head * D
    v += image * N * V_TOKEN + head * D
    inside = (rows[:, None] < M) & (d[None, :] < D)
    queries = tl.load(q + rows[:, None] * Q_TOKEN + d[None, :], inside, 0.0)
    if WIDEN:
        queries = queries.to(tl.float32)
    codes = rows
    if SIZED:
        log_size += image * N
    if BIASED:
        table += head * num_codes
        column_code += image * N
        codes = tl.load(row_code + image * N + rows, rows < M, 0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    whole = 0 if ONE_TILE else N // BLOCK_N * BLOCK_N
    if not ONE_TILE:
        for key in range(0, whole, BLOCK_N):
            highest, total, acc = _tile(
                queries, k, v, log_size, table, codes, column_code, key, N, scale, highest, total, acc,
                K_TOKEN, V_TOKEN, D, D_PAD, BLOCK_N, False, SIZED, BIASED, WIDEN,
            )  # fmt: skip
    if ONE_TILE or whole < N:
        highest, total, acc = _tile(
            queries, k, v, log_size, table, codes, column_code, whole, N, scale, highest, total, acc,
            K_TOKEN, V_TOKEN, D, D_PAD, BLOCK_N, True, SIZED, BIASED, WIDEN,
        )  # fmt: skip
    acc = acc / total[:, None]
    at = out + (image * M + rows[:, None]) * (H * D) + head * D + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), inside)


@triton.jit
def _tile(
    queries, k, v, log_size, table, codes, column_code, begin, N, scale, highest, total, acc,
    K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, SIZED: tl.constexpr, BIASED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: BLOCK_N keys and values from `begin` on."""
    columns, d = begin + tl.arange(0, BLOCK_N), tl.arange(0, D_PAD)
    at_k = k + columns[None, :] * K_TOKEN + d[:, None]
    at_v = v + columns[:, None] * V_TOKEN + d[None, :]
    if MASKED or D < D_PAD:
        keys = tl.load(at_k, (columns[None, :] < N) & (d[:, None] < D), 0.0)
        values = tl.load(at_v, (columns[:, None] < N) & (d[None, :] < D), 0.0)
    else:
        keys, values = tl.load(at_k), tl.load(at_v)
    if WIDEN:
        keys, values = keys.to(tl.float32), values.to(tl.float32)
    score = tl.dot(queries, keys, input_precision="tf32x3") * scale
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
    acc = tl.dot(weight.to(values.dtype), values, acc * shrink[:, None], input_precision="tf32x3")
    return higher, total, acc


@triton.jit(do_not_specialize=["M", "N", "H", "num_codes", "scale"])
def _attend(
    q, k, v, log_size, table, row_code, column_code, out,
    M, N, H, num_codes, scale,
    Q_TOKEN: tl.constexpr, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr,
    SIZED: tl.constexpr, BIASED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of a head of an image."""
    image, head, begin = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0) * BLOCK_M
    _attend_rows(
        q, k, v, log_size, table, row_code, column_code, out, image, head, begin,
        M, N, H, num_codes, scale,
        Q_TOKEN, K_TOKEN, V_TOKEN, D, D_PAD, BLOCK_M, BLOCK_N, ONE_TILE, SIZED, BIASED, WIDEN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "H", "scale", "B", "r", "P", "first_src", "first_dst", "S", "T", "written"])
def _attend_match(
    q, k, v, log_size, out, metric, best, partner, rank, keep, src, first,
    N, H, scale, B, r, P, first_src, first_dst, S, T, written,
    Q_TOKEN: tl.constexpr, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_TILE: tl.constexpr,
    SIZED: tl.constexpr, WIDEN: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    """Like `_attend`; the first programs match an image each, while the others attend.

    Both need only queries, keys and values. One program is enough for an image of few tokens.
    """
    matching = (B + tl.num_programs(0) * tl.num_programs(1) - 1) // (tl.num_programs(0) * tl.num_programs(1))
    if tl.program_id(2) < matching:
        index = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        if index < B:
            _match_image(
                k, metric, best, partner, rank, keep, src, first, index.to(tl.int64),
                N, H, r, P, first_src, first_dst, S, T, written, K_TOKEN, D, D_PAD, COMPARED,
            )  # fmt: skip
    else:
        _attend_rows(
            q, k, v, log_size, None, None, None, out,
            (tl.program_id(2) - matching).to(tl.int64), tl.program_id(1), tl.program_id(0) * BLOCK_M,
            N, N, H, 0, scale,
            Q_TOKEN, K_TOKEN, V_TOKEN, D, D_PAD, BLOCK_M, BLOCK_N, ONE_TILE, SIZED, False, WIDEN,
        )  # fmt: skip


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    bias: Bias | None,
    num_heads: int,
) -> Tensor:
    """See `reference.attend`."""
    (B, M, C), N = q.shape, k.shape[1]
    if log_size is None and bias is None and M > FEW_QUERIES:
        q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out = torch.empty(B, M, C, dtype=q.dtype, device=q.device)
    D = C // num_heads
    cut = blocks_of(M, N, D, q.dtype, bias is not None)
    _launch(
        (ceil_div(M, cut.block_m), num_heads, B),
        (q, k, v, log_size, *(bias or (None, None, None)), out),
        (M, N, num_heads, 0 if bias is None else bias.table.shape[1], D**-0.5 * LOG2_E),
        (
            q.stride(1), k.stride(1), v.stride(1), D, power_of_2(D), cut.block_m, cut.block_n, cut.block_n >= N,
            log_size is not None, bias is not None, widen_products(q),
        ),
        cut.num_warps,
        cut.num_stages,
    )  # fmt: skip
    return out


def attend_match(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    bias: Bias | None,
    metric: Tensor | None,
    num_heads: int,
    r: int,
    num_prefix_tokens: int,
) -> tuple[Tensor, Groups]:
    """See `reference.attend_match`. One launch if the host launches, two streams in a CUDA graph."""
    B, N, C = k.shape
    D = C // num_heads
    halves = matching.halves_of(N, num_prefix_tokens)
    written = halves.written(r, num_prefix_tokens)
    apart = written > matching.FEW_SRC or D > 64 or bias is not None or q.dtype == torch.float32
    if apart or is_recorded(k):
        with beside(k) as join:
            groups = matching.match(matching.metric(k, num_heads) if metric is None else metric, r, num_prefix_tokens)
        out = attend(q, k, v, log_size, bias, num_heads)
        join()
        return out, groups
    out = torch.empty(B, N, C, dtype=q.dtype, device=q.device)
    compared = metric is not None
    metric = metric if compared else torch.empty(B, N, D, dtype=torch.float32, device=q.device)
    groups, notes = matching.empty_groups(B, N, r, halves, q.device)
    cut = blocks_of(N, N, D, q.dtype, biased=False)
    programs = ceil_div(N, cut.block_m)
    _launch_match(
        (programs, num_heads, B + ceil_div(B, programs * num_heads)),
        (q, k, v, log_size, out, metric, *notes, *groups),
        (N, num_heads, D**-0.5 * LOG2_E, B, r, num_prefix_tokens, *halves, written),
        (
            q.stride(1), k.stride(1), v.stride(1), D, power_of_2(D), cut.block_m, cut.block_n, cut.block_n >= N,
            log_size is not None, widen_products(q), compared,
        ),
        cut.num_warps,
        cut.num_stages,
    )  # fmt: skip
    return out, groups


_launch, _launch_match = Kernel(_attend), Kernel(_attend_match)


class Cut(NamedTuple):
    """Division of the work: queries of a program, keys of a step, warps of a program, steps that it loads ahead."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def blocks_of(M: int, N: int, D: int, dtype: torch.dtype, biased: bool) -> Cut:
    """The division for M queries and N keys: the best of a sweep on an H100 (docs/performance.md)."""
    if dtype == torch.float32:
        return Cut(64 if M > FEW_QUERIES else 16, 32, 4, 2)
    if M <= FEW_QUERIES:
        return Cut(16, 64, 2, 3)
    if N <= 128 and D <= 64:  # all keys in one tile
        return Cut(64, 64 if N <= 64 else 128, 4, 1)
    if biased:  # loads that depend on loads must not be made ahead: Triton 3.6 gets them wrong
        return Cut(64, 128 if D <= 64 else 32, 4, 1)
    if D > 64:
        return Cut(64, 64, 4, 2)
    return Cut(64, 128 if N > 256 else 32, 4, 2)
