"""The interface between merging and a family of timm models. Most of it is the same for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers.format import Format
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from tome_core.attention import size_bias
from tome_core.families.blocks import HALVES, LAYERS, Halves
from tome_core.positions import NOWHERE, Position
from tome_core.precision import widened

Images = Tensor | Mapping[str, Tensor]
"""Images (B, 3, H, W), or a NaFlexVit's dictionary: "patches", "patch_coord" and "patch_valid"."""


class UnsupportedModelError(TypeError):
    """Merging is not known to be right in this model; the message names its class and what is supported."""


class Embedded(NamedTuple):
    """The result of embedding images.

    Attributes:
        x: Tokens, (B, N, C), prefix tokens first; a norm may follow (`Family.norm_pre`).
        positions: Position data that all blocks share (a rotary table, a relative bias), or None.
        valid: Which tokens are not padding, (B, N) bool; None if none is padding.
    """

    x: Tensor
    positions: Tensor | None = None
    valid: Tensor | None = None


class Family:
    """An adapter to one family of timm models. It holds no state: the model and its tokens come as arguments.

    In every method `size` is (B, N) float32, or None while nothing has merged.

    Attributes:
        model_classes: The exact model classes that it serves.
        takes_patches: Whether the models take a dictionary of patches for images.
        positional: Whether attention knows positions, so that they must follow their tokens through merges.
        pools: The family's poolings that have a size-weighted form.
    """

    model_classes: tuple[type[nn.Module], ...] = ()
    takes_patches = False
    positional = False
    pools: tuple[str, ...] = ("token", "avg", "max", "avgmax", "map")

    def trunk(self, model: Any) -> Any:
        """The part of the model that holds the patch embedding and the blocks."""
        return model

    def check(self, model: Any) -> None:
        """Refuses blocks that have no known correct form under merging.

        Raises:
            UnsupportedModelError: The message names what was found and what is supported.
        """
        name = type(model).__name__
        for block in self.blocks(model):
            halves = HALVES.get(type(block))
            found = f"cannot merge tokens in a {name} made of {type(block).__name__}"
            if halves is None:
                supported = ", ".join(sorted({cls.__name__ for cls in HALVES}))
                raise UnsupportedModelError(f"{found}; supported blocks: {supported}")
            for layer in halves.layers(block):
                if type(layer) not in LAYERS:
                    supported = ", ".join(sorted({cls.__name__ for cls in LAYERS}))
                    raise UnsupportedModelError(f"{found} with {type(layer).__name__}; supported: {supported}")

    def check_head(self, model: Any) -> None:
        """Refuses poolings that have no known correct form under merging. Features alone need no pooling.

        Raises:
            UnsupportedModelError: The message names what was found and what is supported.
        """
        found = f"cannot classify merged tokens in a {type(model).__name__} with global_pool={model.global_pool!r}"
        if model.global_pool not in self.pools:
            raise UnsupportedModelError(f"{found}; supported: {', '.join(self.pools)}")
        if model.global_pool == "token" and not self.num_prefix_tokens(model):
            raise UnsupportedModelError(f"{found}: it has no class token")
        attn_pool = getattr(model, "attn_pool", None)
        if (attn_pool is not None) != (model.global_pool == "map"):  # older timm leaves a pool that was replaced
            raise UnsupportedModelError(f"{found} and {'an' if attn_pool is not None else 'no'} attention pool")
        if attn_pool is not None and attn_pool.pos_embed is not None:
            raise UnsupportedModelError(f"{found} that adds position embeddings")

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        """The transformer blocks, in order."""
        blocks: Sequence[nn.Module] = self.trunk(model).blocks
        return blocks

    def halves(self, block: nn.Module) -> Halves:
        """The two halves of the block, between which tokens merge."""
        return HALVES[type(block)]

    def num_prefix_tokens(self, model: Any) -> int:
        """Leading tokens that never merge: class, distillation, registers."""
        return int(model.num_prefix_tokens)

    def grid(self, model: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in an image of (height, width) pixels."""
        rows, columns = self.trunk(model).patch_embed.dynamic_feat_size(image_size)
        return int(rows), int(columns)

    def num_tokens(self, model: Any, input_size: tuple[int, int] | None = None) -> int:
        """Tokens that enter the first block, prefix included.

        Args:
            model: The timm model.
            input_size: Height and width of the images; None means the model's own.

        Raises:
            ValueError: The model takes no images of this size.
        """
        embed = self.trunk(model).patch_embed
        if input_size is None:
            return int(embed.num_patches) + self.num_prefix_tokens(model)
        if embed.strict_img_size and tuple(embed.img_size) != tuple(input_size):
            own, other = ("x".join(map(str, size)) for size in (embed.img_size, input_size))
            raise ValueError(f"the model takes images of {own}, not {other}; set_input_size changes that")
        rows, columns = self.grid(model, input_size)
        return rows * columns + self.num_prefix_tokens(model)

    def embed(self, model: Any, images: Any) -> Embedded:
        """Images (B, 3, H, W), or where `takes_patches` a dictionary, to tokens, before `norm_pre`."""
        return self.place(model, self.trunk(model).patch_embed(images))

    def place(self, model: Any, patches: Tensor) -> Embedded:
        """Adds positions and prefix tokens to the patches of the patch embedding."""
        raise NotImplementedError

    def projection(self, model: Any, image_size: tuple[int, int]) -> Tensor | None:
        """The weights of the patch embedding, (C, channels, p, p), if it is one product of square patches.

        `embed` then adds a constant to that product, which `embed_colour` gives.

        Args:
            model: The timm model.
            image_size: Height and width of the images; the result is None if patches do not divide them.
        """
        return _projection(self.trunk(model).patch_embed, image_size)

    def embed_colour(self, model: Any, colour: Tensor | None, image_size: tuple[int, int]) -> Embedded:
        """The result of `embed` for an image of one colour, for a model that has a `projection`.

        Args:
            model: The timm model.
            colour: (channels,), normalised as for the model; None is zeros.
            image_size: Height and width.
        """
        embed = self.trunk(model).patch_embed
        weight, patch = embed.proj.weight, embed.proj.bias
        if colour is not None:
            product = weight.float().sum(dim=(2, 3)) @ colour
            patch = (product if patch is None else product + patch).to(weight.dtype)
        elif patch is None:
            patch = weight.new_zeros(len(weight))
        rows, columns = (side // weight.shape[-1] for side in image_size)
        shape = (rows * columns,) if embed.flatten else (rows, columns)
        return self.place(model, patch.expand(1, *shape, -1))

    def norm_pre(self, model: Any) -> nn.Module:
        """The norm between the patch embedding and the first block."""
        norm: nn.Module = getattr(model, "norm_pre", nn.Identity())
        return norm

    def position(self, model: Any, positions: Tensor | None, i: int) -> Position:
        """The positions of the original tokens that the attention of block i needs.

        Args:
            model: The timm model.
            positions: The result of `embed` for all blocks.
            i: The block.
        """
        return NOWHERE

    def norm(self, model: Any) -> nn.Module:
        """The norm after the last block."""
        norm: nn.Module = model.norm
        return norm

    def reads_prefix_only(self, model: Any) -> bool:
        """Whether the head reads only prefix tokens."""
        return bool(model.global_pool == "token")

    def head(self, model: Any, x: Tensor, size: Tensor | None, pre_logits: bool = False) -> Tensor:
        """Normalised tokens (B, N, C) to logits (B, K), or to pooled features (B, C); a token counts as its size."""
        if size is None or self.reads_prefix_only(model):  # prefix tokens have size 1 and stay in place
            out: Tensor = model.forward_head(x, pre_logits=pre_logits)
            return out
        if not self.pools_prefix(model):
            num_prefix_tokens = self.num_prefix_tokens(model)
            x, size = x[:, num_prefix_tokens:], size[:, num_prefix_tokens:]
        x = self.fc_norm(model, _pool(model, x, size))
        x = model.head_drop(x)
        return x if pre_logits else model.head(x)

    def head_and_features(self, model: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Logits (B, K), None without a classifier, and pooled features (B, C), pooled once if possible."""
        features = self.head(model, x, size, pre_logits=True)
        if not model.num_classes:
            return None, features
        if hasattr(model, "head_dist"):  # each of two classifiers reads a token of its own
            return self.head(model, x, size), features
        return model.head(features), features

    def pools_prefix(self, model: Any) -> bool:
        """Whether prefix tokens are pooled with the others."""
        return bool(getattr(model, "pool_include_prefix", False))

    def fc_norm(self, model: Any, x: Tensor) -> Tensor:
        """The norm after pooling."""
        normed: Tensor = model.fc_norm(x)
        return normed


def _projection(embed: Any, image_size: tuple[int, int]) -> Tensor | None:
    """The weights of timm's plain patch embedding; None if it does more than cut and multiply."""
    if type(embed) is not PatchEmbed or type(embed.proj) is not nn.Conv2d or type(embed.norm) is not nn.Identity:
        return None
    proj, (height, width) = embed.proj, embed.patch_size
    plain = proj.kernel_size == proj.stride == (height, width) and height == width
    plain = plain and (proj.padding, proj.dilation, proj.groups) == ((0, 0), (1, 1), 1)
    laid_out = embed.flatten or embed.output_fmt == Format.NHWC
    expected = image_size == tuple(embed.img_size or image_size) or not embed.strict_img_size
    divided = not any(side % height for side in image_size)
    return proj.weight if plain and laid_out and expected and divided else None


def _pool(model: Any, x: Tensor, size: Tensor) -> Tensor:
    """Pools tokens (B, N, C) to (B, C), each counted `size` times."""
    if model.global_pool == "map":
        pooled: Tensor = model.attn_pool(x, attn_mask=size_bias(size, x.dtype))
        return pooled
    weight = size / size.sum(dim=1, keepdim=True)
    mean = (widened(x) * weight[..., None]).sum(dim=1).to(x.dtype)
    if model.global_pool == "avg":
        return mean
    largest = x.masked_fill((size < 1)[..., None], -torch.inf).amax(dim=1)  # padding is never the largest
    return largest if model.global_pool == "max" else 0.5 * (largest + mean)
