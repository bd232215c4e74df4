"""timm's `VisionTransformer` made of plain `Block`s: ViT, DeiT, distilled, DeiT-3, registers, q/k norm, CLIP towers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tome_core.attention import proportional_attention, size_bias
from tome_core.families.family import UnsupportedModelError

POOLS = ("token", "avg", "max", "avgmax", "map")


class ViTFamily:
    """Adapter to `VisionTransformer` and `VisionTransformerDistilled`."""

    model_classes: tuple[type[nn.Module], ...] = (VisionTransformer, VisionTransformerDistilled)

    def check(self, model: nn.Module) -> None:
        """Refuses other blocks, other attention, and poolings that have no size-weighted form."""
        vit = _vit(model)
        for block in vit.blocks:
            if type(block) is not Block or type(block.attn) is not Attention:
                attention = type(getattr(block, "attn", None)).__name__
                raise UnsupportedModelError(
                    f"cannot merge tokens in a {type(model).__name__} made of {type(block).__name__} with "
                    f"{attention}; supported: Block with Attention"
                )
        if vit.global_pool not in POOLS:
            raise UnsupportedModelError(
                f"cannot merge tokens in a {type(model).__name__} with global_pool={vit.global_pool!r}; "
                f"supported: {', '.join(POOLS)}"
            )
        if vit.global_pool == "map" and _map_pool(vit).pos_embed is not None:
            raise UnsupportedModelError(
                f"cannot merge tokens in a {type(model).__name__} whose attention pool adds position embeddings"
            )

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return cast(Sequence[nn.Module], _vit(model).blocks)

    def num_prefix_tokens(self, model: nn.Module) -> int:
        return int(_vit(model).num_prefix_tokens)

    def num_tokens(self, model: nn.Module) -> int:
        return int(_vit(model).patch_embed.num_patches) + self.num_prefix_tokens(model)

    def embed(self, model: nn.Module, images: Tensor) -> Tensor:
        vit = _vit(model)
        x = vit._pos_embed(vit.patch_embed(images))
        return cast(Tensor, vit.norm_pre(vit.patch_drop(x)))

    def block(self, block: nn.Module, x: Tensor, size: Tensor | None) -> Tensor:
        return cast(Tensor, block(x, attn_mask=size_bias(size, x.dtype)))

    def attend(self, block: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        block = cast(Block, block)
        attended, metric = _attention(cast(Attention, block.attn), block.norm1(x), size)
        return x + block.drop_path1(block.ls1(attended)), metric

    def feed_forward(self, block: nn.Module, x: Tensor) -> Tensor:
        block = cast(Block, block)
        y: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return y

    def norm(self, model: nn.Module, x: Tensor) -> Tensor:
        return cast(Tensor, _vit(model).norm(x))

    def head(self, model: nn.Module, x: Tensor, size: Tensor | None) -> Tensor:
        vit = _vit(model)
        if size is None or vit.global_pool == "token":  # prefix tokens have size 1 and stay in place
            return vit.forward_head(x)
        if not vit.pool_include_prefix:
            x, size = x[:, vit.num_prefix_tokens :], size[:, vit.num_prefix_tokens :]
        x = vit.fc_norm(_pool(vit, x, size))
        return cast(Tensor, vit.head(vit.head_drop(x)))


def _attention(attn: Attention, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """timm's attention with sizes, and its metric: keys averaged over heads in float32, (B, N, D)."""
    B, N, _ = x.shape
    gate = getattr(attn, "gate", None)  # newer timm alone has it
    q, k, v = attn.qkv(x).reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    dropout = attn.attn_drop.p if attn.training else 0.0
    y = proportional_attention(q, k, v, size, dropout).transpose(1, 2).reshape(B, N, -1)
    y = attn.norm(y)
    if gate is not None:
        y = y * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y)), k.mean(dim=1, dtype=torch.float32)


def _pool(vit: VisionTransformer, x: Tensor, size: Tensor) -> Tensor:
    """Pools tokens (B, N, C) to (B, C), each as if it stood there `size` times."""
    if vit.global_pool == "map":
        return cast(Tensor, _map_pool(vit)(x, attn_mask=size_bias(size, x.dtype)))
    weight = size / size.sum(dim=1, keepdim=True)
    mean = (x.float() * weight[..., None]).sum(dim=1).to(x.dtype)
    if vit.global_pool == "avg":
        return mean
    largest = x.amax(dim=1)
    return largest if vit.global_pool == "max" else 0.5 * (largest + mean)


def _vit(model: nn.Module) -> VisionTransformer:
    return cast(VisionTransformer, model)


def _map_pool(vit: VisionTransformer) -> AttentionPoolLatent:
    return vit.attn_pool
