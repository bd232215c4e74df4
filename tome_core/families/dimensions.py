"""The dimensions of a timm model, from which its arithmetic is counted."""

from __future__ import annotations

from typing import Any

from torch import nn

from tome_core.cost import Dimensions
from tome_core.families.family import UnsupportedModelError
from tome_core.vit import MergedViT


def dimensions(merged: MergedViT) -> Dimensions:
    """Reads the dimensions of a model whose blocks are one attention of plain matrices, then an MLP.

    They leave out the cost of positions that travel with tokens (rotary, relative), about 1 %.

    Raises:
        UnsupportedModelError: Its arithmetic is of another kind: parallel blocks, grouped queries, attention pooling.
    """
    model: Any = merged.model
    family = merged.family
    block: Any = family.blocks(model)[0]
    refusal = UnsupportedModelError(f"the arithmetic of a {type(model).__name__} made of such blocks cannot be counted")
    trunk = family.trunk(model)
    if model.global_pool == "map" or not (
        hasattr(block, "attn") and hasattr(block, "mlp") and hasattr(trunk, "patch_embed")
    ):
        raise refusal
    width, attention_width = int(model.embed_dim), _query(block.attn).out_features
    if getattr(block.attn, "qkv", None) is not None:
        attention_width //= 3
    if _weights(block.attn) != 4 * width * attention_width or hasattr(block.attn, "lambda_q1"):
        raise refusal
    classifier = model.get_classifier()
    return Dimensions(
        num_tokens=merged.num_tokens,
        num_prefix_tokens=merged.num_prefix_tokens,
        num_blocks=merged.num_blocks,
        width=width,
        attention_width=attention_width,
        head_width=attention_width // int(block.attn.num_heads),
        mlp_weights=_weights(block.mlp),
        patch_inputs=trunk.patch_embed.proj.weight[0].numel(),
        head_weights=sum(map(_weights, classifier if isinstance(classifier, tuple) else (classifier,))),
        prefix_only_last=family.reads_prefix_only(model),
    )


def _query(attention: Any) -> nn.Linear:
    """The projection to queries, separate or joint with keys and values."""
    joint: nn.Linear | None = getattr(attention, "qkv", None)
    alone: nn.Linear = attention.q_proj if joint is None else joint
    return alone


def _weights(module: nn.Module) -> int:
    """Weights of all its matrices."""
    return sum(each.weight.numel() for each in module.modules() if isinstance(each, nn.Linear))
