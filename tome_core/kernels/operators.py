"""Each fused operation as a `torch.library` operator of known shape, so that it compiles and exports as one node.

Each checks its operands, then calls Triton on a GPU and plain PyTorch elsewhere. Without tracing this is a plain call,
because the dispatch of an operator in Python takes longer than a launch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from tome_core.kernels import launch, reference, requirements
from tome_core.kernels.groups import Groups
from tome_core.kernels.norms import Norm
from tome_core.kernels.relative import Bias

P = ParamSpec("P")
R = TypeVar("R")


def _operator(fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function an operator; `fake` returns empty results of the right shape, `mutates` names what it
    changes.
    """

    def made(function: Callable[P, R]) -> Callable[P, R]:
        operator = torch.library.custom_op(f"tome::{function.__name__[1:]}", function, mutates_args=mutates)
        operator.register_fake(fake)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            traced = torch.compiler.is_compiling() or type(args[0]) is not Tensor
            return operator(*args, **kwargs) if traced else function(*args, **kwargs)

        return call

    return made


def _implementation(name: str, x: Tensor) -> Any:
    """The module of an operation for x's device. Triton is imported when a GPU first needs it."""
    return reference if launch.missing_on(x.device) else _kernels(name)


@cache
def _kernels(name: str) -> Any:
    return importlib.import_module(f"tome_core.kernels.{name}")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    bias: Bias | None,
    num_heads: int,
) -> Tensor:
    """`reference.attend`: proportional attention over heads side by side."""
    requirements.for_attend(q, k, v, log_size, bias, num_heads)
    table, rows, columns = bias or (None, None, None)
    return _attend(q, k, v, log_size, table, rows, columns, num_heads)


@_operator(lambda q, *_: q.new_empty(q.shape))
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    table: Tensor | None,
    row_code: Tensor | None,
    column_code: Tensor | None,
    num_heads: int,
) -> Tensor:
    bias = Bias(table, row_code, column_code) if table is not None else None  # type: ignore[arg-type]
    out: Tensor = _implementation("attention", q).attend(q, k, v, log_size, bias, num_heads)
    return out


def attend_match(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    bias: Bias | None,
    found: Tensor | None,
    num_heads: int,
    r: int,
    num_prefix_tokens: int,
) -> tuple[Tensor, Groups]:
    """`reference.attend_match`: attention, and the r most similar pairs that merge after it."""
    requirements.for_attend(q, k, v, log_size, bias, num_heads)
    requirements.for_attend_match(q, k, found, num_heads, r, num_prefix_tokens)
    table, rows, columns = bias or (None, None, None)
    out, *groups = _attend_match(q, k, v, log_size, table, rows, columns, found, num_heads, r, num_prefix_tokens)
    return out, Groups(*groups)


def _attended(q: Tensor, *others: Any) -> tuple[Tensor, ...]:
    B, N, _ = q.shape
    r = others[-2]
    return q.new_empty(q.shape), *(q.new_empty(B, width, dtype=torch.int32) for width in (N - r, r, N - r + 1))


@_operator(_attended)
def _attend_match(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None,
    table: Tensor | None,
    row_code: Tensor | None,
    column_code: Tensor | None,
    found: Tensor | None,
    num_heads: int,
    r: int,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = Bias(table, row_code, column_code) if table is not None else None  # type: ignore[arg-type]
    out, (keep, src, first) = _implementation("attention", q).attend_match(
        q, k, v, log_size, bias, found, num_heads, r, num_prefix_tokens
    )
    return out, keep, src, first


def metric(k: Tensor, num_heads: int) -> Tensor:
    """`reference.metric`: the metric of tokens."""
    requirements.for_metric(k, num_heads)
    return _metric(k, num_heads)


def _metric_of(k: Tensor, num_heads: int) -> Tensor:
    return k.new_empty(*k.shape[:2], k.shape[2] // num_heads, dtype=torch.float32)


@_operator(_metric_of)
def _metric(k: Tensor, num_heads: int) -> Tensor:
    out: Tensor = _implementation("matching", k).metric(k, num_heads)
    return out


def rotate(
    q: Tensor, k: Tensor, table: Tensor, size: Tensor | None, num_heads: int, halved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.rotate`: rotary embedding of queries and keys, and the metric of the keys before it."""
    requirements.for_rotate(q, k, table, size, num_heads)
    return _rotate(q, k, table, size, num_heads, halved)


@_operator(
    lambda q, k, table, size, num_heads, _: (q.new_empty(q.shape), k.new_empty(k.shape), _metric_of(k, num_heads))
)
def _rotate(
    q: Tensor, k: Tensor, table: Tensor, size: Tensor | None, num_heads: int, halved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, found = _implementation("rotary", k).rotate(q, k, table, size, num_heads, halved)
    return q, k, found


def match(metric: Tensor, r: int, num_prefix_tokens: int) -> Groups:
    """`reference.match`: the r most similar pairs, by output row."""
    requirements.for_match(metric, r, num_prefix_tokens)
    return Groups(*_match(metric, r, num_prefix_tokens))


def _groups_of(metric: Tensor, r: int, num_prefix_tokens: int) -> tuple[Tensor, ...]:
    B, N, _ = metric.shape
    return tuple(metric.new_empty(B, width, dtype=torch.int32) for width in (N - r, r, N - r + 1))


@_operator(_groups_of)
def _match(metric: Tensor, r: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    keep, src, first = _implementation("matching", metric).match(metric, r, num_prefix_tokens)
    return keep, src, first


def norm(
    x: Tensor, offset: Tensor | None, norm: Norm, dtype: torch.dtype | None = None, multiplier: float = 1.0
) -> Tensor:
    """`reference.norm`: a norm of x + offset."""
    requirements.for_add_norm(x, None, None, offset, norm)
    return _norm(x, offset, *norm, dtype or x.dtype, multiplier)


@_operator(lambda x, offset, weight, bias, eps, centred, dtype, _: x.new_empty(x.shape, dtype=dtype))
def _norm(
    x: Tensor,
    offset: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
    multiplier: float,
) -> Tensor:
    made = Norm(weight, bias, eps, centred)
    out: Tensor = _implementation("merging", x).norm(x, offset, made, dtype, multiplier)
    return out


def add_norm(
    x: Tensor,
    y: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    norm: Norm,
    dtype: torch.dtype | None = None,
    multiplier: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`reference.add_norm`: a residual sum and its norm."""
    requirements.for_add_norm(x, y, scale, offset, norm)
    return _add_norm(x, y, scale, offset, *norm, dtype or y.dtype, multiplier)


def _added(x: Tensor, y: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    shape = (y.shape[0], *x.shape[1:])
    return y.new_empty(shape), y.new_empty(shape, dtype=others[-2])


@_operator(_added)
def _add_norm(
    x: Tensor,
    y: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
    multiplier: float,
) -> tuple[Tensor, Tensor]:
    made = Norm(weight, bias, eps, centred)
    x, n = _implementation("merging", y).add_norm(x, y, scale, offset, made, dtype, multiplier)
    return x, n


def merge_add_norm(
    groups: Groups,
    x: Tensor,
    y: Tensor | None,
    size: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    norm: Norm,
    dtype: torch.dtype | None = None,
    multiplier: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.merge_add_norm`: a residual sum, the merge of its tokens, and their norm."""
    requirements.for_merge_add_norm(groups, x, y, size, scale, offset, norm)
    keep, src, first = groups
    return _merge_add_norm(keep, src, first, x, y, size, scale, offset, *norm, dtype or x.dtype, multiplier)


def _merged(keep: Tensor, src: Tensor, first: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    shape = (*keep.shape, x.shape[2])
    sizes = (x.new_empty(keep.shape, dtype=torch.float32) for _ in range(2))
    return x.new_empty(shape), x.new_empty(shape, dtype=others[-2]), *sizes


@_operator(_merged)
def _merge_add_norm(
    keep: Tensor,
    src: Tensor,
    first: Tensor,
    x: Tensor,
    y: Tensor | None,
    size: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
    multiplier: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, made = Groups(keep, src, first), Norm(weight, bias, eps, centred)
    x, n, size, log_size = _implementation("merging", x).merge_add_norm(
        groups, x, y, size, scale, offset, made, dtype, multiplier
    )
    return x, n, size, log_size


def merge_sums(groups: Groups, sums: Tensor) -> Tensor:
    """`reference.merge_sums`: sums over the members of tokens, added up over the tokens that merge."""
    requirements.for_merge_sums(groups, sums)
    return _merge_sums(*groups, sums)


@_operator(lambda keep, src, first, sums: sums.new_empty(*keep.shape, sums.shape[2]))
def _merge_sums(keep: Tensor, src: Tensor, first: Tensor, sums: Tensor) -> Tensor:
    out: Tensor = _implementation("merging", sums).merge_sums(Groups(keep, src, first), sums)
    return out


def cut(images: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """`reference.cut`: images as rows of their patches."""
    requirements.for_cut(images, patch)
    return _cut(images, patch, dtype)


def _rows_of(images: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    B, channels, H, W = (images.shape[i] for i in ((0, 3, 1, 2) if images.dtype == torch.uint8 else range(4)))
    K = channels * patch * patch
    return images.new_empty(B, (H // patch) * (W // patch), K + -K % 8, dtype=dtype)


@_operator(_rows_of)
def _cut(images: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    out: Tensor = _implementation("patches", images).cut(images, patch, dtype)
    return out


def linear_gelu8(a: Tensor, weight: Tensor, bias: Tensor, factor: float, multiplier: float) -> Tensor:
    """`reference.linear_gelu8`: a product in float8, and its GELU in float8."""
    requirements.for_product8(a, weight, bias)
    return _linear_gelu8(a, weight, bias, factor, multiplier)


@_operator(lambda a, weight, *_: a.new_empty(*a.shape[:-1], len(weight)))
def _linear_gelu8(a: Tensor, weight: Tensor, bias: Tensor, factor: float, multiplier: float) -> Tensor:
    out: Tensor = _implementation("products8", a).linear_gelu8(a, weight, bias, factor, multiplier)
    return out


def accumulate8(x: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, factor: float) -> None:
    """`reference.accumulate8`: a product in float8, added to the residual in place."""
    requirements.for_product8(a, weight, bias, scale, x)
    _accumulate8(x, a, weight, bias, scale, factor)


@_operator(lambda *_: None, mutates=("x",))
def _accumulate8(
    x: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, factor: float
) -> None:
    _implementation("products8", a).accumulate8(x, a, weight, bias, scale, factor)
