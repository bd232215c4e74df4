"""Products of float8 operands, fused with GELU or the sum into the residual. For GPUs from Hopper on.

A program computes one tile after another. The tensor memory accelerator loads operands and stores results, so the end
of a tile overlaps the beginning of the next.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tome_core.kernels.launch import Kernel, ceil_div, interpreted

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 128
"""A tile of the result, and the columns of both operands for one step."""

GROUP = 8
"""Tiles above each other that run together, so that they share the weights in the cache."""


@triton.jit
def _gelu(x):
    """GELU in its tanh form, which is x sigmoid(2 u)."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp2(-2.8853900817779268 * inner))


@triton.jit
def _gelu_fast(x):
    """Like `_gelu`, by the instruction for tanh."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    tanh = tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [inner], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip
    return 0.5 * x * (1.0 + tanh)


@triton.jit
def _ended(acc, bias, scale, column, N: tl.constexpr, factor, BIASED: tl.constexpr, SCALED: tl.constexpr):
    """scale (factor acc + bias)."""
    y = acc * factor
    if BIASED:
        y += tl.load(bias + column, column < N, 0.0).to(tl.float32)[None, :]
    if SCALED:
        y *= tl.load(scale + column, column < N, 0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["M", "factor", "multiplier"])
def _multiply(
    a, weight, bias, scale, out,
    M, factor, multiplier,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    GELU: tl.constexpr, ADDED: tl.constexpr, BIASED: tl.constexpr, SCALED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Every PROGRAMS-th tile of a weight^T. With ADDED it is added to `out`, in halves that fit into memory."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    HALF: tl.constexpr = BLOCK_N // 2
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        top = tile // (GROUP * columns) * GROUP
        height = tl.minimum(rows - top, GROUP)
        within = tile % (GROUP * columns)
        m, n = (top + within % height) * BLOCK_M, within // height * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(a.load([m, k]), weight.load([n, k]).T, acc)
        if ADDED:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
            y = _ended(left, bias, scale, n + tl.arange(0, HALF), N, factor, BIASED, SCALED)
            out.store([m, n], (y + out.load([m, n]).to(tl.float32)).to(out.dtype))
            y = _ended(right, bias, scale, n + HALF + tl.arange(0, HALF), N, factor, BIASED, SCALED)
            out.store([m, n + HALF], (y + out.load([m, n + HALF]).to(tl.float32)).to(out.dtype))
        else:
            y = _ended(acc, bias, scale, n + tl.arange(0, BLOCK_N), N, factor, BIASED, SCALED)
            if GELU:
                y = _gelu_fast(y) if FAST else _gelu(y)
            out.store([m, n], (y * multiplier).to(out.dtype))


def linear_gelu8(a: Tensor, weight: Tensor, bias: Tensor, factor: float, multiplier: float) -> Tensor:
    """See `reference.linear_gelu8`."""
    out = torch.empty(*a.shape[:-1], len(weight), dtype=a.dtype, device=a.device)
    _run(a, weight, bias, None, out, factor, multiplier, gelu=True)
    return out


def accumulate8(x: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, factor: float) -> None:
    """See `reference.accumulate8`."""
    _run(a, weight, bias, scale, x, factor, 1.0, gelu=False)


def _run(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    factor: float,
    multiplier: float,
    gelu: bool,
) -> None:
    N, K = weight.shape
    if not a.numel():
        return
    rows, result = a.view(-1, K), out.view(-1, N)
    tiles, processors = ceil_div(len(rows), BLOCK_M) * ceil_div(N, BLOCK_N), _num_processors(a.device)
    _launch(
        (min(tiles, processors), 1, 1),
        (
            TensorDescriptor.from_tensor(rows, [BLOCK_M, BLOCK_K]),
            TensorDescriptor.from_tensor(weight, [BLOCK_N, BLOCK_K]),
            bias, scale,
            TensorDescriptor.from_tensor(result, [BLOCK_M, BLOCK_N if gelu else BLOCK_N // 2]),
        ),
        (len(rows), factor, multiplier),
        (
            N, K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, processors,
            gelu, not gelu, bias is not None, scale is not None, not interpreted(),
        ),
        num_warps=8,
        num_stages=3,
    )  # fmt: skip


_launch = Kernel(_multiply)


@cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
