"""The fused operations, each a `torch.library` operator: Triton on a GPU, plain PyTorch elsewhere.

`reference` says what each means, and is what the kernels are held against. As operators with a known shape of their
result they go through `torch.compile` and `torch.export` in one piece.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_core.kernels import reference
from tome_core.kernels.groups import Groups
from tome_core.kernels.launch import HAS_COMPILER, HAS_TRITON

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 128
"""Channels of the widest head that attention takes; narrower ones must be a multiple of 8."""


def missing_on(device: torch.device) -> str | None:
    """Why there are no Triton kernels for a device; None where there are."""
    if device.type != "cuda":
        return f"there are no kernels for {device.type}"
    if not HAS_TRITON:
        return "the package triton is not installed"
    if not HAS_COMPILER:
        return "Triton needs a C compiler, and there is neither gcc nor clang, nor does CC name one"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"the GPU has compute capability {capability[0]}.{capability[1]}, not 8.0"


def _implementation(name: str, x: Tensor) -> Any:
    """The module of an operation for x's device; Triton is imported when a GPU first needs it."""
    if missing_on(x.device):
        return reference
    return importlib.import_module(f"tome_core.kernels.{name}")


@torch.library.custom_op("tome::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, num_heads: int) -> Tensor:
    """`reference.attend`: proportional attention over heads side by side."""
    out: Tensor = _implementation("attention", q).attend(q, k, v, size, num_heads)
    return out


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, num_heads: int) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("tome::metric", mutates_args=())
def metric(k: Tensor, num_heads: int) -> Tensor:
    """`reference.metric`: what tokens are compared by."""
    out: Tensor = _implementation("matching", k).metric(k, num_heads)
    return out


@metric.register_fake
def _(k: Tensor, num_heads: int) -> Tensor:
    return k.new_empty(*k.shape[:2], k.shape[2] // num_heads, dtype=torch.float32)


@torch.library.custom_op("tome::match", mutates_args=())
def _match(metric: Tensor, r: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    groups: Groups = _implementation("matching", metric).match(metric, r, num_prefix_tokens)
    return groups.keep, groups.src, groups.first


@_match.register_fake
def _(metric: Tensor, r: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    (B, N, _), number = metric.shape, torch.int32
    return tuple(metric.new_empty(B, width, dtype=number) for width in (N - r, r, N - r + 1))  # type: ignore[return-value]


def match(metric: Tensor, r: int, num_prefix_tokens: int) -> Groups:
    """`reference.match`: the r most similar pairs, by the row that they end in."""
    return Groups(*_match(metric, r, num_prefix_tokens))


@torch.library.custom_op("tome::add_norm", mutates_args=())
def add_norm(
    x: Tensor, y: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.add_norm`: a residual sum and its norm."""
    out: tuple[Tensor, Tensor] = _implementation("merging", x).add_norm(x, y, scale, weight, bias, eps)
    return out


@add_norm.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(x.shape)


@torch.library.custom_op("tome::merge_add_norm", mutates_args=())
def _merge_add_norm(
    keep: Tensor,
    src: Tensor,
    first: Tensor,
    x: Tensor,
    y: Tensor,
    size: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = Groups(keep, src, first)
    out: tuple[Tensor, Tensor, Tensor]
    out = _implementation("merging", x).merge_add_norm(groups, x, y, size, scale, weight, bias, eps)
    return out


@_merge_add_norm.register_fake
def _(
    keep: Tensor,
    src: Tensor,
    first: Tensor,
    x: Tensor,
    y: Tensor,
    size: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*keep.shape, x.shape[2])
    return x.new_empty(shape), y.new_empty(shape), x.new_empty(keep.shape, dtype=torch.float32)


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
    """`reference.merge_add_norm`: a residual sum, the merge of its tokens, and their norm."""
    out: tuple[Tensor, Tensor, Tensor] = _merge_add_norm(*groups, x, y, size, scale, weight, bias, eps)
    return out


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x weight^T + bias), (B, N, C) to (B, N, K); in half precision on a GPU in the epilogue of the product.

    That epilogue takes the tanh form of GELU, which differs by less than half precision can tell (5e-4).
    """
    if x.device.type != "cuda" or x.dtype == torch.float32:
        return F.gelu(F.linear(x, weight, bias))
    out: Tensor = torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True)
    unflat: Tensor = out.unflatten(0, x.shape[:2])
    return unflat
