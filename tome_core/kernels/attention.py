"""Proportional attention in one pass over keys and values, heads side by side as the joint projection leaves them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tome_core.kernels.launch import widen_products

LOG2_E = 1.4426950408889634


@triton.jit
def _attend(
    q, k, v, size, out,
    q_image, q_token, k_image, k_token,
    M, N, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SIZED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of a head of an image against all of its keys, by an online softmax in base 2."""
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D_PAD)
    at_q = (rows[:, None] < M) & (d[None, :] < D)
    queries = tl.load(q + image * q_image + rows[:, None] * q_token + head * D + d[None, :], at_q, 0.0)
    if WIDEN:
        queries = queries.to(tl.float32)
    k += image * k_image + head * D
    v += image * k_image + head * D
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for begin in range(0, N, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        keys = tl.load(k + columns[None, :] * k_token + d[:, None], (columns[None, :] < N) & (d[:, None] < D), 0.0)
        values = tl.load(v + columns[:, None] * k_token + d[None, :], (columns[:, None] < N) & (d[None, :] < D), 0.0)
        if WIDEN:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        score = tl.dot(queries, keys, input_precision="tf32x3") * scale
        if SIZED:
            score += tl.log2(tl.load(size + image * N + columns, columns < N, 1.0))[None, :]
        score = tl.where(columns[None, :] < N, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(values.dtype), values, acc * shrink[:, None], input_precision="tf32x3")
        highest = higher
    C = tl.num_programs(1) * D
    acc = acc / total[:, None]
    tl.store(out + (image * M + rows[:, None]) * C + head * D + d[None, :], acc.to(out.dtype.element_ty), at_q)


def attend(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, num_heads: int) -> Tensor:
    """As `reference.attend`; q, k and v may be views of a joint projection, as long as channels are contiguous."""
    (B, M, C), N = q.shape, k.shape[1]
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1 and k.stride() == v.stride()
    out = torch.empty(B, M, C, dtype=q.dtype, device=q.device)
    D = C // num_heads
    blocks = blocks_of(M, D, q.dtype)
    _attend[(triton.cdiv(M, blocks["BLOCK_M"]), num_heads, B)](
        q, k, v, size, out,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        M, N, D**-0.5 * LOG2_E,
        D, max(triton.next_power_of_2(D), 16), SIZED=size is not None, WIDEN=widen_products(q), **blocks,
    )  # fmt: skip
    return out


def blocks_of(M: int, D: int, dtype: torch.dtype) -> dict[str, int]:
    """How the work is cut for M queries: few choices, so that few programs are compiled."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64 if M > 16 else 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    block_m = 128 if M > 64 and D <= 64 else 64 if M > 16 else 16
    return {"BLOCK_M": block_m, "BLOCK_N": 64, "num_warps": 8 if block_m == 128 else 4, "num_stages": 2}
