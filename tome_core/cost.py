"""What a schedule costs in arithmetic, from a model's dimensions alone. Pure Python, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tome_core.schedule import clip


@dataclass(frozen=True)
class Dimensions:
    """The sizes that decide how much arithmetic one image takes.

    Attributes:
        num_tokens: Tokens that enter the first block, prefix included.
        num_prefix_tokens: Leading tokens that never merge.
        num_blocks: Transformer blocks, all alike.
        width: Features of a token, C.
        attention_width: Features of its queries, num_heads * D.
        head_width: Features of one head, D; the metric has as many.
        mlp_weights: Weights of the matrices in one block's MLP: 2 * C * hidden where there are two.
        patch_inputs: Values in one patch that the embedding reads: channels * height * width.
        num_classes: Outputs of the head, which reads one pooled token.
        prefix_only_last: The head reads prefix tokens alone, so the last block merges nothing and computes only its
            keys and values for the others.
    """

    num_tokens: int
    num_prefix_tokens: int
    num_blocks: int
    width: int
    attention_width: int
    head_width: int
    mlp_weights: int
    patch_inputs: int
    num_classes: int
    prefix_only_last: bool = False


def flops(dimensions: Dimensions, schedule: Sequence[int]) -> int:
    """Floating-point operations of one image under a schedule, a multiply and an add counted as two.

    Matrix products and convolutions are counted, with those that match and merge tokens; norms, activations and sorting
    are not. `torch.utils.flop_counter.FlopCounterMode` counts the same.

    Args:
        dimensions: The model.
        schedule: `r` of each block, `num_blocks` numbers; clipped where a block cannot merge that many.

    Raises:
        ValueError: The schedule lists more or fewer blocks than the model has.
    """
    d = dimensions
    if len(schedule) != d.num_blocks:
        raise ValueError(f"the schedule lists {len(schedule)} blocks; this model has {d.num_blocks}")
    N, P = d.num_tokens, d.num_prefix_tokens
    products = (N - P) * d.patch_inputs * d.width + d.width * d.num_classes
    for block, r in enumerate(clip(schedule, N, P)):
        if d.prefix_only_last and block == d.num_blocks - 1:
            products += _block(d, queries=P, keys=N, leaving=P)
        else:
            products += _block(d, queries=N, keys=N, leaving=N - r) + _merging(d, N, r)
            N -= r
    return 2 * products


def _block(d: Dimensions, queries: int, keys: int, leaving: int) -> int:
    """Multiplications of queries, keys, values, two attention products, projection, then the MLP after the merge."""
    projections = (2 * queries + 2 * keys) * d.width * d.attention_width
    return projections + 2 * queries * keys * d.attention_width + leaving * d.mlp_weights


def _merging(d: Dimensions, N: int, r: int) -> int:
    """Multiplications of src against dst similarities, and of the one-hot merge."""
    if r == 0:
        return 0
    num_src = (N - d.num_prefix_tokens + (d.num_prefix_tokens + 1) % 2) // 2
    num_dst = N - d.num_prefix_tokens - num_src
    return num_src * num_dst * d.head_width + (N - r) * r * d.width
