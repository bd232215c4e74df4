"""The forward loop of pre-norm blocks with fused operations, which turns saved arithmetic into saved time.

A half of a block passes on its tokens and their norm. Its last product adds to the residual in place, so the next norm
reads one tensor. The residual leaves out the biases of these products: their running sum is one offset for all tokens,
which no merge changes, and every norm adds it when it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tome_core.families.attention import joint_bias, project
from tome_core.families.family import Family
from tome_core.families.parts import Parts, hidden, norm_of, output_of, parts_of
from tome_core.fp8 import Block8, Product8
from tome_core.kernels import (
    FLOAT8,
    Groups,
    Norm,
    accumulate,
    accumulate8,
    add_norm,
    attend,
    attend_match,
    linear8,
    linear_gelu8,
    merge_add_norm,
    merge_sums,
    norm,
    rotate,
)
from tome_core.positions import Position
from tome_core.travelling import bias_at, start, table_at


class _Tokens(NamedTuple):
    """Tokens between two halves of a block.

    Attributes:
        x: The residual without its offset, (B, N, C). The loop writes into it.
        n: The next half's norm of it, (B, N, C).
        size: Token sizes, (B, N) float32; None before the first merge.
        log_size: log2 of them.
        places: Their positions, as in `travelling`, (1 or B, N, K); None if attention uses no positions.
    """

    x: Tensor
    n: Tensor
    size: Tensor | None = None
    log_size: Tensor | None = None
    places: Tensor | None = None


class _Ending(NamedTuple):
    """How a half of a block ends.

    Attributes:
        linear: Its last product; None if the half has computed it.
        scale: LayerScale, (C,), or None.
        offset: The part that the residual lacks after it, (C,) float32, or None.
        norm: The norm that reads the sum; None if no fused operation computes it.
        multiplier: Scale of the norm's result for float8; None keeps the model's dtype.
        product8: The last product in float8; None multiplies by `linear`.
    """

    linear: nn.Linear | None
    scale: Tensor | None
    offset: Tensor | None
    norm: Norm | None
    multiplier: float | None = None
    product8: Product8 | None = None


def run_blocks(
    family: Family,
    model: Any,
    x: Tensor,
    n: Tensor,
    positions: Tensor | None,
    schedule: Sequence[int],
    prefix_only: bool,
    float8: Sequence[Block8 | None],
) -> tuple[Tensor, Tensor | None]:
    """Runs tokens through all blocks and the norm after them.

    Args:
        family: The model's adapter.
        model: A model for which `families.parts.reason_against` gives None.
        x: Tokens that enter the first block, (B, N, C), contiguous. They are overwritten.
        n: The first block's norm of them.
        positions: As from `Family.embed`.
        schedule: `r` of each block, clipped.
        prefix_only: Whether the last block computes only prefix tokens, and merges nothing.
        float8: The products of each block in float8; None or no entry for blocks in the model's dtype.

    Returns:
        Normalised tokens, (B, M, C), and their sizes, (B, M) float32, or None if nothing has merged.
    """
    P, blocks = family.num_prefix_tokens(model), family.blocks(model)
    float8 = float8 or [None] * len(blocks)
    endings: list[_Ending] = []
    tokens = _Tokens(x, n, places=start(family.position(model, positions, 0), x, P))
    for i, (block, r) in enumerate(zip(blocks, schedule, strict=True)):
        num_queries = P if prefix_only and i == len(blocks) - 1 else None
        position = family.position(model, positions, i)
        y, groups = _attention(block.attn, tokens, position, r, P, num_queries, float8[i])
        # # Read them while a GPU is busy with the first block.
        endings = endings or _endings([parts_of(block) for block in blocks], norm_of(family.norm(model)), float8)
        if num_queries is not None:
            tokens = _Tokens(tokens.x[:, :P].contiguous(), tokens.n)
        tokens = _end(tokens, y, endings[2 * i], groups)
        tokens = _end(tokens, _mlp(block.mlp, tokens.n, float8[i]), endings[2 * i + 1])
    if endings[-1].norm is None:
        return family.norm(model)(tokens.n), tokens.size
    return tokens.n, tokens.size


def _attention(
    attn: Any,
    tokens: _Tokens,
    position: Position,
    r: int,
    P: int,
    num_queries: int | None,
    float8: Block8 | None,
) -> tuple[Tensor, Groups | None]:
    """The input of attention's last product, (B, num_queries or N, C), and the groups that merge after it."""
    if float8 is None or float8.qkv is None:
        q, k, v = project(attn, tokens.n, num_queries)
    else:
        q, k, v = _project8(attn, float8.qkv, tokens, num_queries)
    q = q if num_queries is None else q.contiguous()
    H, found, groups = attn.num_heads, None, None
    q, k = _normed(attn, "q_norm", q), _normed(attn, "k_norm", k)
    if position.rope is not None:
        table = table_at(position.rope, tokens.places, tokens.size, P)
        q, k, found = rotate(q, k, table, tokens.size, H, getattr(attn, "rotate_half", False))
    bias = bias_at(position, tokens.places, tokens.size, P)
    if r and num_queries is None:
        y, groups = attend_match(q, k, v, tokens.log_size, bias, found, H, r, P)
    else:
        y = attend(q, k, v, tokens.log_size, bias, H)
    if hasattr(attn, "norm"):
        y = attn.norm(y)
    if getattr(attn, "gate", None) is not None:
        y = y * attn.gate(tokens.n[:, :num_queries]).sigmoid()
    return y, groups


def _project8(attn: Any, product: Product8, tokens: _Tokens, num_queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """`project` in float8."""
    C, dtype, bias = len(product.weight) // 3, tokens.x.dtype, joint_bias(attn)
    if num_queries is None:
        q, k, v = linear8(tokens.n, product.weight, bias, product.scales, dtype).split(C, dim=-1)
        return q, k, v
    weights = product.weight.split([C, 2 * C])
    biases = (None, None) if bias is None else bias.split([C, 2 * C])
    q = linear8(tokens.n[:, :num_queries].contiguous(), weights[0], biases[0], product.scales, dtype)
    k, v = linear8(tokens.n, weights[1], biases[1], product.scales, dtype).split(C, dim=-1)
    return q, k, v


def _mlp(mlp: Any, n: Tensor, float8: Block8 | None) -> Tensor:
    """The input of the MLP's last product, or the MLP's output if the two cannot be separated."""
    if float8 is None or float8.fc2 is None:
        whole: Tensor = mlp(n) if output_of(mlp) is None else hidden(mlp, n)
        return whole
    if float8.fc1 is None:
        return (hidden(mlp, n) * float8.fc2.multiplier).to(FLOAT8)
    return linear_gelu8(n, float8.fc1.weight, mlp.fc1.bias, float8.fc1.factor, float8.fc2.multiplier)


def _end(tokens: _Tokens, y: Tensor, ending: _Ending, groups: Groups | None = None) -> _Tokens:
    """The end of a half: its last product of y, the residual sum, the merge, and the norm that reads it."""
    x, linear, scale, offset = tokens.x, ending.linear, ending.scale, ending.offset
    added: Tensor | None = y
    if linear is not None and ending.product8 is not None:
        bias = None if scale is None else linear.bias
        accumulate8(x, y, ending.product8.weight, bias, scale, ending.product8.factor)
        added = scale = None
    elif linear is not None and scale is None:
        accumulate(x, y, linear.weight)
        added = None
    elif linear is not None:
        added = linear(y)
    form = (x.dtype, 1.0) if ending.multiplier is None else (FLOAT8, ending.multiplier)
    if groups is not None:
        assert ending.norm is not None  # # merges come before the norm of an MLP
        merged = merge_add_norm(groups, x, added, tokens.size, scale, offset, ending.norm, *form)
        return _Tokens(*merged, None if tokens.places is None else merge_sums(groups, tokens.places))
    if ending.norm is None:
        total = x if added is None else x + (added if scale is None else scale * added)
        return tokens._replace(n=total if offset is None else (total + offset).to(x.dtype))
    if added is None:
        return tokens._replace(n=norm(x, offset, ending.norm, *form))
    x, n = add_norm(x, added, scale, offset, ending.norm, *form)
    return tokens._replace(x=x, n=n)


def _endings(blocks: Sequence[Parts], last: Norm | None, float8: Sequence[Block8 | None]) -> list[_Ending]:
    """The endings of all halves, in order."""
    linears = [linear for parts in blocks for linear in (parts.attn.proj, output_of(parts.mlp))]
    scales = [scale for parts in blocks for scale in (parts.scale1, parts.scale2)]
    norms = [norm for parts in blocks for norm in (parts.norm1, parts.norm2)][1:] + [last]
    offsets = _offsets(linears, scales)
    read8 = [product for block in float8 for product in ((block.qkv, block.fc1) if block else (None, None))]
    multipliers = [None if product is None else product.multiplier for product in read8[1:]] + [None]
    ended8 = [product for block in float8 for product in (None, block.fc2 if block else None)]
    return [_Ending(*ending) for ending in zip(linears, scales, offsets, norms, multipliers, ended8, strict=True)]


def _offsets(linears: Sequence[nn.Linear | None], scales: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The offset that the residual lacks after each half: the sum of the biases that its products left out."""
    lacking = [
        linear.bias if linear is not None and scale is None else None
        for linear, scale in zip(linears, scales, strict=True)
    ]
    biases: list[Tensor] = [bias for bias in lacking if bias is not None]
    if not biases:
        return [None] * len(lacking)
    sums = torch.stack(biases).float().cumsum(dim=0).unbind()
    offsets: list[Tensor | None] = []
    count = 0
    for bias in lacking:
        count += bias is not None
        offsets.append(sums[count - 1] if count else None)
    return offsets


def _normed(attn: Any, name: str, x: Tensor) -> Tensor:
    """Queries or keys, (B, N, C), after the norm of each head, if there is one."""
    norm = getattr(attn, name, None)
    if norm is None or type(norm) is nn.Identity:
        return x
    by_head: Tensor = norm(x.unflatten(-1, (attn.num_heads, -1)))
    return by_head.flatten(2)
