"""The arithmetic that a schedule costs, from a model's dimensions alone. Pure Python, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tome_core.schedule import clip


@dataclass(frozen=True)
class Dimensions:
    """The sizes that decide the arithmetic of one image.

    Attributes:
        num_tokens: Tokens that enter the first block, including prefix tokens.
        num_prefix_tokens: Leading tokens that never merge.
        num_blocks: Transformer blocks, all alike.
        width: Features of a token, C.
        attention_width: Features of its query, num_heads * D.
        head_width: Features of one head, D, and of the metric.
        mlp_weights: Weights of the matrices in one block's MLP: 2 * C * hidden if there are two matrices.
        patch_inputs: Values of one patch that the embedding reads: channels * height * width.
        head_weights: Weights of the classifier's matrices, which see one pooled token.
        prefix_only_last: Whether the head reads only prefix tokens. Then the last block merges nothing, and computes
            only keys and values of the other tokens.
    """

    num_tokens: int
    num_prefix_tokens: int
    num_blocks: int
    width: int
    attention_width: int
    head_width: int
    mlp_weights: int
    patch_inputs: int
    head_weights: int
    prefix_only_last: bool


def flops(dimensions: Dimensions, schedule: Sequence[int]) -> int:
    """Floating-point operations for one image under a schedule. A multiplication and its addition count as two.

    All matrix products and convolutions count, including those that match and merge tokens. Norms, activations and
    sorting do not. `torch.utils.flop_counter.FlopCounterMode` counts the same.

    Args:
        dimensions: The model's dimensions.
        schedule: `r` of each block, clipped to what the block can merge.

    Raises:
        ValueError: The length of the schedule is not the number of blocks.
    """
    d = dimensions
    if len(schedule) != d.num_blocks:
        raise ValueError(f"the schedule lists {len(schedule)} blocks; this model has {d.num_blocks}")
    N, P = d.num_tokens, d.num_prefix_tokens
    products = (N - P) * d.patch_inputs * d.width + d.head_weights
    for block, r in enumerate(clip(schedule, N, P)):
        if d.prefix_only_last and block == d.num_blocks - 1:
            products += _block(d, queries=P, keys=N, leaving=P)
        else:
            products += _block(d, queries=N, keys=N, leaving=N - r) + _merging(d, N, r)
            N -= r
    return 2 * products


def _block(d: Dimensions, queries: int, keys: int, leaving: int) -> int:
    """Products of the projections, of both halves of attention, and of the MLP."""
    linear = 2 * (queries + keys) * d.width * d.attention_width
    return linear + 2 * queries * keys * d.attention_width + leaving * d.mlp_weights


def _merging(d: Dimensions, N: int, r: int) -> int:
    """Products of the similarities of src and dst, and of the one-hot matrix that merges."""
    if r == 0:
        return 0
    patches = N - d.num_prefix_tokens
    num_src = (patches + 1 - d.num_prefix_tokens % 2) // 2
    return num_src * (patches - num_src) * d.head_width + (N - r) * r * d.width
