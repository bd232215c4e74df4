"""The kernels' requirements on their operands, checked for every implementation.

Plain PyTorch, which a CPU uses, accepts operands that the kernels refuse. The checks precede the choice of
implementation, so that a fault of the forward loop shows on every machine. Each raises a ValueError that names the
operand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tome_core.kernels.groups import Groups
from tome_core.kernels.norms import Norm
from tome_core.kernels.relative import Bias

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the kernels; plain PyTorch also takes float64."""

FLOAT8 = torch.float8_e4m3fn

SMALLEST_HEAD, LARGEST_HEAD = 16, 128
"""Channels of the heads that attention supports, in multiples of 8."""


def fits_head(D: int) -> bool:
    """Whether attention supports heads of D channels."""
    return SMALLEST_HEAD <= D <= LARGEST_HEAD and D % 8 == 0


def for_attend(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor | None, bias: Bias | None, num_heads: int) -> None:
    """Checks the operands of `attend`."""
    _check_heads(q, k, num_heads)
    _check_rows("v", v, k.shape, k.dtype)
    if log_size is not None:
        _check("log_size", log_size, k.shape[:2], torch.float32)
    if bias is not None:
        if bias.table.ndim != 2 or len(bias.table) != num_heads:
            raise ValueError(f"the table of a bias has shape {tuple(bias.table.shape)}, not one row for each head")
        _check("table", bias.table, bias.table.shape, torch.float32)
        _check("row_code", bias.row_code, k.shape[:2], torch.int32)
        _check("column_code", bias.column_code, k.shape[:2], torch.int32)


def for_attend_match(
    q: Tensor, k: Tensor, found: Tensor | None, num_heads: int, r: int, num_prefix_tokens: int
) -> None:
    """Checks the operands of `attend_match` besides those of `attend`."""
    B, N, C = k.shape
    if q.shape[1] != N:
        raise ValueError(f"there are {q.shape[1]} queries for {N} keys; merging needs a query for each key")
    if found is not None:
        _check("metric", found, (B, N, C // num_heads), torch.float32)
    _check_r(r, N, num_prefix_tokens)


def for_metric(k: Tensor, num_heads: int) -> None:
    """Checks the operands of `metric`."""
    _head_width(k, num_heads)
    _check_rows("k", k, k.shape, k.dtype)


def for_rotate(q: Tensor, k: Tensor, table: Tensor, size: Tensor | None, num_heads: int) -> None:
    """Checks the operands of `rotate`."""
    D, (B, N, _) = _check_heads(q, k, num_heads), k.shape
    if (
        table.ndim != 3
        or table.shape[0] not in (1, B)
        or table.shape[1] != N
        or table.shape[2] not in (2 * D, 2 * k.shape[2])
    ):
        raise ValueError(
            f"the rotary table has shape {tuple(table.shape)}; it must be (1 or {B}, {N}, {2 * D} or {2 * k.shape[2]})"
        )
    _check("table", table, table.shape, table.dtype)
    if size is not None:
        _check("size", size, (B, N), torch.float32)


def for_match(metric: Tensor, r: int, num_prefix_tokens: int) -> None:
    """Checks the operands of `match`."""
    if metric.ndim != 3:
        raise ValueError(f"metric has shape {tuple(metric.shape)}; it must be (B, N, D)")
    _check("metric", metric, metric.shape, torch.float32)
    _check_r(r, metric.shape[1], num_prefix_tokens)


def for_add_norm(x: Tensor, y: Tensor | None, scale: Tensor | None, offset: Tensor | None, norm: Norm) -> None:
    """Checks the operands of `norm` and `add_norm`."""
    B, N, C = x.shape
    _check("x", x, x.shape, x.dtype)
    if y is not None:
        if y.ndim != 3 or y.shape[1] > N or B not in (1, y.shape[0]):
            raise ValueError(f"y has shape {tuple(y.shape)}, which does not fit x of {tuple(x.shape)}")
        _check("y", y, (y.shape[0], y.shape[1], C), y.dtype)
    for name, vector in (("scale", scale), ("weight", norm.weight), ("bias", norm.bias)):
        if vector is not None:
            _check(name, vector, (C,), vector.dtype)
    if offset is not None:
        _check("offset", offset, (C,), torch.float32)


def for_merge_add_norm(
    groups: Groups,
    x: Tensor,
    y: Tensor | None,
    size: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    norm: Norm,
) -> None:
    """Checks the operands of `merge_add_norm`."""
    for_add_norm(x, y, scale, offset, norm)
    B, N, _ = x.shape
    _check_groups(groups, B, N)
    if size is not None:
        _check("size", size, (B, N), torch.float32)


def for_merge_sums(groups: Groups, sums: Tensor) -> None:
    """Checks the operands of `merge_sums`."""
    B, N, K = sums.shape
    _check("sums", sums, sums.shape, sums.dtype)
    _check_groups(groups, groups.keep.shape[0] if B == 1 else B, N)


def for_cut(images: Tensor, patch: int) -> None:
    """Checks the operands of `cut`."""
    if images.ndim != 4 or not images.is_contiguous():
        raise ValueError(f"images are not contiguous in four dimensions: {tuple(images.shape)}, {images.stride()}")
    sides = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
    if any(side % patch for side in sides):
        raise ValueError(f"patches of {patch} pixels do not divide images of {tuple(sides)}")


def for_product8(
    a: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None, x: Tensor | None = None
) -> None:
    """Checks the operands of a product in float8, and the residual that it adds to."""
    N, K = weight.shape
    _check("weight", weight, (N, K), FLOAT8)
    _check("a", a, (*a.shape[:-1], K), FLOAT8)
    if N % 16 or K % 16:
        raise ValueError(f"weights of {N} x {K} are not multiples of 16, as float8 products need")
    for name, vector in (("bias", bias), ("scale", scale)):
        if vector is not None:
            _check(name, vector, (N,), vector.dtype)
    if x is not None:
        if not x.dtype.is_floating_point:
            raise ValueError(f"x is {x.dtype}; it must be {', '.join(map(str, DTYPES))}")
        _check("x", x, (*a.shape[:-1], N), x.dtype)


def _check_r(r: int, N: int, num_prefix_tokens: int) -> None:
    most = (N - num_prefix_tokens) // 2
    if not 0 < r <= most:
        raise ValueError(f"r is {r}; it must be between 1 and {most}")


def _head_width(k: Tensor, num_heads: int) -> int:
    D, rest = divmod(k.shape[-1], num_heads)
    if rest or not fits_head(D):
        raise ValueError(
            f"{k.shape[-1]} channels are {num_heads} heads of {k.shape[-1] / num_heads:g}; heads must have a multiple "
            f"of 8 from {SMALLEST_HEAD} to {LARGEST_HEAD}"
        )
    return D


def _check_heads(q: Tensor, k: Tensor, num_heads: int) -> int:
    """Checks queries and keys; returns the channels of a head."""
    D = _head_width(k, num_heads)
    B, N, C = k.shape
    if q.ndim != 3 or q.shape[1] > N:
        raise ValueError(f"q has shape {tuple(q.shape)}, which does not fit k of {tuple(k.shape)}")
    _check_rows("q", q, (B, q.shape[1], C), k.dtype)
    _check_rows("k", k, (B, N, C), k.dtype)
    return D


def _check_groups(groups: Groups, B: int, N: int) -> None:
    M = groups.keep.shape[1]
    for name, index, width in zip(Groups._fields, groups, (M, N - M, M + 1), strict=True):
        _check(name, index, (B, width), torch.int32)


def _check(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Checks shape, dtype and contiguity."""
    _check_kind(name, tensor, shape, dtype)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: shape {tuple(shape)}, strides {tensor.stride()}")


def _check_rows(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Checks shape and dtype, and that channels are contiguous; rows may be those of a joint projection."""
    _check_kind(name, tensor, shape, dtype)
    image, token, channel = tensor.stride()
    if channel != 1 or (image != shape[1] * token and shape[0] > 1):
        raise ValueError(
            f"{name} of shape {tuple(shape)} has strides {tensor.stride()}; its tokens must follow each other"
        )


def _check_kind(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be {dtype} of {tuple(shape)}"
        )
    if dtype not in DTYPES and dtype not in (torch.int32, torch.float64, FLOAT8):
        raise ValueError(f"{name} is {dtype}; kernels take {', '.join(map(str, DTYPES))}")
    if dtype == torch.float64 and tensor.device.type == "cuda":
        raise ValueError(f"{name} is {dtype}; kernels take {', '.join(map(str, DTYPES))}")
