"""Residual sum, merge and norm in one pass. Each row gathers its members, so the order of sums is fixed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tome_core.kernels.groups import Groups
from tome_core.kernels.launch import Kernel, ceil_div, power_of_2
from tome_core.kernels.norms import Norm


@triton.jit
def _sum_of(
    x, y, scale, y_first, token, inside, c,
    C: tl.constexpr, ADDED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Rows of x + scale y in float32. Row `y_first` of x is row 0 of y; rows before it have no y."""
    columns = c[None, :] < C
    total = tl.load(x + token[:, None] * C + c[None, :], inside[:, None] & columns, 0.0).to(tl.float32)
    if ADDED:
        at = (token - y_first)[:, None] * C + c[None, :]
        added = tl.load(y + at, (inside & (token >= y_first))[:, None] & columns, 0.0).to(tl.float32)
        if SCALED:
            added *= tl.load(scale + c, c < C, 0.0).to(tl.float32)[None, :]
        total += added
    return total


@triton.jit(do_not_specialize=["x_image", "y_image", "y_first", "N", "M", "r", "eps", "multiplier"])
def _add_norm(
    x, y, scale, offset, weight, bias, keep, src, first, size, x_out, n_out, size_out, log_size_out,
    x_image, y_image, y_first, N, M, r, eps, multiplier,
    C: tl.constexpr, C_PAD: tl.constexpr, ROWS: tl.constexpr,
    MERGED: tl.constexpr, SIZED: tl.constexpr, ADDED: tl.constexpr, SCALED: tl.constexpr, STORED: tl.constexpr,
    SHIFTED: tl.constexpr, CENTRED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """One program: ROWS output rows of an image."""
    image = tl.program_id(1).to(tl.int64)
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, C_PAD)
    inside, columns = row < M, c < C
    x += image * x_image * C
    if ADDED:
        y += image * y_image * C
    if MERGED:
        head = tl.load(keep + image * M + row, inside, 0)
        begin = tl.load(first + image * (M + 1) + row, inside, 0)
        count = tl.load(first + image * (M + 1) + row + 1, inside, 0) - begin
        total = tl.load(size + image * N + head, inside, 1.0) if SIZED else tl.full([ROWS], 1.0, tl.float32)
        acc = _sum_of(x, y, scale, y_first, head, inside, c, C, ADDED, SCALED) * total[:, None]
        for member in range(tl.max(count, 0)):
            joins = inside & (member < count)
            token = tl.load(src + image * r + begin + member, joins, 0)
            gain = tl.load(size + image * N + token, joins, 0.0) if SIZED else joins.to(tl.float32)
            acc += _sum_of(x, y, scale, y_first, token, joins, c, C, ADDED, SCALED) * gain[:, None]
            total += gain
        acc = acc / total[:, None]
        tl.store(size_out + image * M + row, total, inside)
        tl.store(log_size_out + image * M + row, tl.log2(total), inside)
    else:
        acc = _sum_of(x, y, scale, y_first, row, inside, c, C, ADDED, SCALED)
    at = (image * M + row[:, None]) * C + c[None, :]
    stored = inside[:, None] & columns[None, :]
    if STORED:
        tl.store(x_out + at, acc.to(x_out.dtype.element_ty), stored)
    if SHIFTED:
        acc += tl.load(offset + c, columns, 0.0)[None, :]
    if CENTRED:
        acc = tl.where(columns[None, :], acc - (tl.sum(acc, 1) / C)[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(acc * acc, 1) / C + eps)
    normed = acc / deviation[:, None] * tl.load(weight + c, columns, 0.0).to(tl.float32)[None, :]
    if BIASED:
        normed += tl.load(bias + c, columns, 0.0).to(tl.float32)[None, :]
    tl.store(n_out + at, (normed * multiplier).to(n_out.dtype.element_ty), stored)


def norm(x: Tensor, offset: Tensor | None, norm: Norm, dtype: torch.dtype, multiplier: float) -> Tensor:
    """See `reference.norm`."""
    B, N, C = x.shape
    n = torch.empty(B, N, C, dtype=dtype, device=x.device)
    _launch(None, x, None, None, None, offset, norm, multiplier, None, n)
    return n


def add_norm(
    x: Tensor,
    y: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    norm: Norm,
    dtype: torch.dtype,
    multiplier: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.add_norm`."""
    shape = (len(y), x.shape[1], x.shape[2])
    x_out, n = (torch.empty(shape, dtype=d, device=x.device) for d in (y.dtype, dtype))
    _launch(None, x, y, None, scale, offset, norm, multiplier, x_out, n)
    return x_out, n


def merge_add_norm(
    groups: Groups,
    x: Tensor,
    y: Tensor | None,
    size: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    norm: Norm,
    dtype: torch.dtype,
    multiplier: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.merge_add_norm`."""
    (B, M), C = groups.keep.shape, x.shape[2]
    x_out, n = (torch.empty(B, M, C, dtype=d, device=x.device) for d in (x.dtype, dtype))
    size_out, log_size_out = (torch.empty(B, M, dtype=torch.float32, device=x.device) for _ in range(2))
    _launch(groups, x, y, size, scale, offset, norm, multiplier, x_out, n, size_out, log_size_out)
    return x_out, n, size_out, log_size_out


def _launch(
    groups: Groups | None,
    x: Tensor,
    y: Tensor | None,
    size: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    norm: Norm,
    multiplier: float,
    x_out: Tensor | None,
    n: Tensor,
    size_out: Tensor | None = None,
    log_size_out: Tensor | None = None,
) -> None:
    (B, M, C), N = n.shape, x.shape[1]
    num_added = 0 if y is None else y.shape[1]
    keep, src, first = groups or (None, None, None)
    _launch_add_norm(
        (ceil_div(M, rows_of(C)), B, 1),
        (
            x, y, scale, offset, norm.weight, norm.bias, keep, src, first, size,
            x_out, n, size_out, log_size_out,
        ),
        (N if len(x) == B else 0, num_added, N - num_added, N, M, N - M, norm.eps, multiplier),
        (
            C, power_of_2(C), rows_of(C), groups is not None, size is not None, y is not None, scale is not None,
            x_out is not None, offset is not None, norm.centred, norm.bias is not None,
        ),
        num_warps=2 if C <= 1024 else 4,
    )  # fmt: skip


def rows_of(C: int) -> int:
    """Rows of one program for C channels."""
    return max(1024 // power_of_2(C), 1)


@triton.jit(do_not_specialize=["sums_image", "M", "r"])
def _merge_sums(
    sums, keep, src, first, out, sums_image, M, r, K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """One program: ROWS output rows of an image."""
    image = tl.program_id(1).to(tl.int64)
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, K_PAD)
    inside = row < M
    sums += image * sums_image * K
    head = tl.load(keep + image * M + row, inside, 0)
    begin = tl.load(first + image * (M + 1) + row, inside, 0)
    count = tl.load(first + image * (M + 1) + row + 1, inside, 0) - begin
    acc = tl.load(sums + head[:, None] * K + c[None, :], inside[:, None] & (c[None, :] < K), 0.0).to(tl.float32)
    for member in range(tl.max(count, 0)):
        joins = inside & (member < count)
        token = tl.load(src + image * r + begin + member, joins, 0)
        acc += tl.load(sums + token[:, None] * K + c[None, :], joins[:, None] & (c[None, :] < K), 0.0)
    acc = acc.to(out.dtype.element_ty)
    tl.store(out + (image * M + row[:, None]) * K + c[None, :], acc, inside[:, None] & (c[None, :] < K))


def merge_sums(groups: Groups, sums: Tensor) -> Tensor:
    """See `reference.merge_sums`."""
    (B, M), (_, N, K) = groups.keep.shape, sums.shape
    out = torch.empty(B, M, K, dtype=sums.dtype, device=sums.device)
    rows = min(max(2048 // power_of_2(K), 1), 64)
    numbers = (N if len(sums) == B else 0, M, N - M)
    _launch_merge_sums((ceil_div(M, rows), B, 1), (sums, *groups, out), numbers, (K, power_of_2(K), rows), num_warps=4)
    return out


_launch_add_norm, _launch_merge_sums = Kernel(_add_norm), Kernel(_merge_sums)
