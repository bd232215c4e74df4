"""Residual sum, merge and norm in one pass. Each row gathers what it is made of: nothing is added out of order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tome_core.kernels.groups import Groups


@triton.jit
def _sum_of(x, y, scale, token, inside, c, C: tl.constexpr, SCALED: tl.constexpr):
    """Rows of x + scale y in float32."""
    at = token[:, None] * C + c[None, :]
    inside = inside[:, None] & (c[None, :] < C)
    added = tl.load(y + at, inside, 0.0).to(tl.float32)
    if SCALED:
        added *= tl.load(scale + c, c < C, 0.0).to(tl.float32)[None, :]
    return tl.load(x + at, inside, 0.0).to(tl.float32) + added


@triton.jit
def _add_norm(
    x, y, scale, weight, bias, keep, src, first, size, x_out, n_out, size_out,
    N, M, r, eps,
    C: tl.constexpr, C_PAD: tl.constexpr, ROWS: tl.constexpr,
    MERGED: tl.constexpr, SIZED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS output rows of an image."""
    image = tl.program_id(1).to(tl.int64)
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, C_PAD)
    inside = row < M
    x += image * N * C
    y += image * N * C
    if MERGED:
        head = tl.load(keep + image * M + row, inside, 0)
        begin = tl.load(first + image * (M + 1) + row, inside, 0)
        count = tl.load(first + image * (M + 1) + row + 1, inside, 0) - begin
        total = tl.load(size + image * N + head, inside, 1.0) if SIZED else tl.full([ROWS], 1.0, tl.float32)
        acc = _sum_of(x, y, scale, head, inside, c, C, SCALED) * total[:, None]
        for member in range(tl.max(count, 0)):
            joins = inside & (member < count)
            token = tl.load(src + image * r + begin + member, joins, 0)
            gain = tl.load(size + image * N + token, joins, 0.0) if SIZED else joins.to(tl.float32)
            acc += _sum_of(x, y, scale, token, joins, c, C, SCALED) * gain[:, None]
            total += gain
        acc = acc / total[:, None]
        tl.store(size_out + image * M + row, total, inside)
    else:
        acc = _sum_of(x, y, scale, row, inside, c, C, SCALED)
    at = (image * M + row[:, None]) * C + c[None, :]
    stored = inside[:, None] & (c[None, :] < C)
    tl.store(x_out + at, acc.to(x_out.dtype.element_ty), stored)
    mean = tl.sum(acc, 1) / C
    centred = tl.where(c[None, :] < C, acc - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    gain = tl.load(weight + c, c < C, 0.0).to(tl.float32)
    shift = tl.load(bias + c, c < C, 0.0).to(tl.float32)
    normed = centred / deviation[:, None] * gain[None, :] + shift[None, :]
    tl.store(n_out + at, normed.to(n_out.dtype.element_ty), stored)


def add_norm(
    x: Tensor, y: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `reference.add_norm`."""
    x_out, n_out, _ = _launch(None, x, y, None, scale, weight, bias, eps)
    return x_out, n_out


def merge_add_norm(
    groups: Groups,
    x: Tensor,
    y: Tensor,
    size: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.merge_add_norm`."""
    x_out, n_out, size_out = _launch(groups, x, y, size, scale, weight, bias, eps)
    assert size_out is not None
    return x_out, n_out, size_out


def _launch(
    groups: Groups | None,
    x: Tensor,
    y: Tensor,
    size: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    B, N, C = x.shape
    assert x.is_contiguous() and y.is_contiguous() and (size is None or size.is_contiguous())
    keep, src, first = groups if groups else (None, None, None)
    M = keep.shape[1] if keep is not None else N
    x_out = torch.empty(B, M, C, dtype=x.dtype, device=x.device)
    n_out = torch.empty(B, M, C, dtype=y.dtype, device=x.device)
    size_out = torch.empty(B, M, dtype=torch.float32, device=x.device) if groups else None
    blocks = blocks_of(C)
    _add_norm[(triton.cdiv(M, blocks["ROWS"]), B)](
        x, y, scale, weight, bias, keep, src, first, size, x_out, n_out, size_out,
        N, M, N - M, eps,
        C, triton.next_power_of_2(C),
        MERGED=groups is not None, SIZED=size is not None, SCALED=scale is not None, **blocks,
    )  # fmt: skip
    return x_out, n_out, size_out


def blocks_of(C: int) -> dict[str, int]:
    """How the work is cut for C channels."""
    C_pad = triton.next_power_of_2(C)
    return {"ROWS": max(1024 // C_pad, 1), "num_warps": 2 if C_pad <= 1024 else 4}
