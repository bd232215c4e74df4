"""Matrix products with a fused epilogue, from torch's libraries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    """gelu(x weight^T + bias), (B, N, C) to (B, N, K). In half precision on a GPU, GELU is in the product's epilogue.

    That epilogue uses the tanh form of GELU, which differs from the exact one by less than the resolution of half
    precision (5e-4).

    Args:
        x: (B, N, C).
        weight: (K, C).
        bias: (K,).
        tanh: Whether the model defines GELU in its tanh form.
    """
    if x.device.type != "cuda" or x.dtype == torch.float32:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh" if tanh else "none")
    out: Tensor = torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True)
    unflat: Tensor = out.unflatten(0, x.shape[:2])
    return unflat


def accumulate(x: Tensor, y: Tensor, weight: Tensor) -> None:
    """x += y weight^T, in place: the product adds to the residual, which saves a pass over both.

    Args:
        x: (B, N, C), contiguous.
        y: (B, N, K).
        weight: (C, K).
    """
    x.view(-1, x.shape[2]).addmm_(y.flatten(0, 1), weight.t())


def linear8(
    a: Tensor, weight: Tensor, bias: Tensor | None, scales: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Tensor:
    """A product of float8 operands: a weight^T times both scales, and bias.

    Args:
        a: (B, N, K).
        weight: (C, K).
        bias: (C,), or None.
        scales: Inverse scales of a and of the weights, float32 scalars.
        dtype: Dtype of the result.
    """
    rows = a.flatten(0, 1)
    if a.device.type != "cuda":
        y = (F.linear(rows.float(), weight.float()) * scales[0] * scales[1]).to(dtype)
        y = y if bias is None else y + bias
    else:
        y = torch._scaled_mm(rows, weight.t(), *scales, bias=bias, out_dtype=dtype, use_fast_accum=True)
    unflat: Tensor = y.unflatten(0, a.shape[:2])
    return unflat
