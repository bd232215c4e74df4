"""Block products in float8 (e4m3), with scales that cannot overflow and need no data.

A LayerNorm of C channels gives at most sqrt(C) |weight| + |bias|. By Cauchy and Schwarz, a linear layer after it gives
at most sqrt(C) times the length of its weights, and GELU enlarges nothing. The scales map these bounds to the largest
float8, so nothing is clipped. e4m3 is a float, so a bound that is ten times too wide costs nothing: accuracy is lost by
its 3 bits of mantissa (docs/accuracy.md).

Queries, keys, values and the MLP are multiplied in float8 if the products have enough inputs. The output projection of
attention is not: it is the smallest product, and loses most for the time it saves. The first block is not either: all
later blocks inherit its loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tome_core.families import Family, UnsupportedModelError
from tome_core.families.parts import is_gelu_mlp, parts_of
from tome_core.kernels import FLOAT8, Norm
from tome_core.kernels import missing_on as kernels_missing_on

FIRST = 1
"""The first block that multiplies in float8."""

NARROWEST = 384
"""Fewest inputs of a float8 product: a smaller product is bound by memory traffic, and averages over too few values."""

LARGEST = 448.0
"""The largest e4m3."""

SMALLEST = 1e-12
"""Stands for the largest value if all values are zero."""

ROUNDED = (1 + 2**-4) ** 2
"""How much rounding to e4m3 can enlarge the product of an input and a weight: half a step of 3 bits for each."""

NOT_FINITE = "cannot multiply in float8: a norm or a product has weights that are not finite"


class Product8(NamedTuple):
    """The weights of a product, and the scales of its operands.

    Attributes:
        weight: (C, K) in float8, scaled to its range.
        multiplier: Scales the input before it is rounded to float8.
        factor: Scales the product back.
        scales: The reciprocals whose product is `factor`, for torch's own product: float32, on the device.
    """

    weight: Tensor
    multiplier: float
    factor: float
    scales: tuple[Tensor, Tensor]


class Block8(NamedTuple):
    """The products of a block; None for one that stays in the model's dtype."""

    qkv: Product8 | None
    fc1: Product8 | None
    fc2: Product8 | None


def reason_against(family: Family, model: Any) -> str | None:
    """Why a model whose blocks run fused cannot be multiplied in float8; None if it can."""
    for i, block in enumerate(family.blocks(model)):
        attn: Any = block.attn
        mlp: Any = block.mlp
        joint = getattr(attn, "qkv", None)
        if type(joint) is not nn.Linear or getattr(attn, "gate", None) is not None:
            return f"block {i} has no joint projection of queries, keys and values, or a gate"
        if not is_gelu_mlp(mlp):
            return f"block {i} has a {type(mlp).__name__} that is not two products with GELU between them"
        inputs = (joint.in_features, mlp.fc1.out_features)
        if max(inputs) < NARROWEST or any(n % 16 for n in (*inputs, joint.out_features)):
            return f"its products have {inputs} inputs; float8 takes multiples of 16 from {NARROWEST} on"
    return None


def missing_on(device: torch.device) -> str | None:
    """Why a device cannot multiply in float8; None if it can."""
    against = kernels_missing_on(device)
    if against:
        return against
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (9, 0) else f"the GPU has compute capability {capability[0]}.{capability[1]}, not 9.0"


@torch.no_grad()
def quantise(family: Family, model: Any, like: Sequence[Block8 | None] = ()) -> list[Block8 | None]:
    """The blocks' products in float8, from the current weights; None for a block that stays in the model's dtype.

    Args:
        family: The model's adapter.
        model: The model.
        like: The products of a model with the same matrices, which are shared.

    Raises:
        UnsupportedModelError: The model cannot be multiplied in float8; the message says why.
    """
    against = reason_against(family, model)
    if against:
        raise UnsupportedModelError(f"cannot multiply a {type(model).__name__} in float8: {against}")
    blocks = list(family.blocks(model))
    alike = like or [None] * len(blocks)
    made = [_block(block, same) for block, same in zip(blocks[FIRST:], alike[FIRST:], strict=True)]
    return [None] * min(FIRST, len(blocks)) + made


def _block(block: Any, like: Block8 | None) -> Block8:
    parts, (fc1, fc2) = parts_of(block), (block.mlp.fc1, block.mlp.fc2)
    like = like or Block8(None, None, None)
    hidden = _largest_output(parts.norm2, fc1)
    second = _product(fc2.weight, hidden, like.fc2)
    return Block8(
        _product(block.attn.qkv.weight, _largest(parts.norm1), like.qkv),
        None if second is None else _product(fc1.weight, _largest(parts.norm2), like.fc1),
        second,
    )


def _product(weight: Tensor, largest_input: float, like: Product8 | None) -> Product8 | None:
    if weight.shape[1] < NARROWEST:
        return None
    if not math.isfinite(largest_input):
        raise UnsupportedModelError(NOT_FINITE)
    # # A shared matrix keeps its scale: the weights may have changed since.
    quantised, scale = _scaled(weight) if like is None else (like.weight, 1 / (like.multiplier * like.factor))
    multiplier = LARGEST / max(largest_input, SMALLEST)
    scales = tuple(torch.tensor(1 / s, dtype=torch.float32, device=weight.device) for s in (multiplier, scale))
    return Product8(quantised, multiplier, 1 / (multiplier * scale), scales)  # type: ignore[arg-type]


def _scaled(weight: Tensor) -> tuple[Tensor, float]:
    """A matrix in float8, and its scale."""
    largest = weight.abs().max().item()
    if not math.isfinite(largest):
        raise UnsupportedModelError(NOT_FINITE)
    scale = LARGEST / max(largest, SMALLEST)
    return (weight.float() * scale).to(FLOAT8).contiguous(), scale


def _largest(norm: Norm) -> float:
    """An upper bound of a norm's output."""
    bounds = norm.weight.float().abs() * len(norm.weight) ** 0.5
    return float((bounds if norm.bias is None else bounds + norm.bias.float().abs()).max())


def _largest_output(norm: Norm, linear: nn.Linear) -> float:
    """An upper bound of the output of a linear layer after a norm."""
    weight = linear.weight.float()
    bounds = (weight * norm.weight.float()).norm(dim=1) * len(norm.weight) ** 0.5
    shift = torch.zeros_like(bounds) if norm.bias is None else weight @ norm.bias.float()
    return float((ROUNDED * (bounds + shift.abs()) + linear.bias.float().abs()).max())
