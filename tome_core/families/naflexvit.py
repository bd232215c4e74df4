"""timm's `NaFlexVit`, given plain images, or images of several sizes as a dictionary of patches with padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.naflexvit import NaFlexEmbeds, NaFlexVit
from torch import Tensor, nn

from tome_core.families.family import Embedded, Family, UnsupportedModelError
from tome_core.families.rope import with_exact_grid, with_table
from tome_core.positions import Position


class NaFlexFamily(Family):
    """Adapter to `NaFlexVit`."""

    model_classes: tuple[type[nn.Module], ...] = (NaFlexVit,)
    takes_patches = True
    positional = True

    def check(self, model: Any) -> None:
        super().check(model)
        if model.patch_drop is not None and model.rope_is_mixed:
            raise UnsupportedModelError(
                "cannot merge tokens in a NaFlexVit that drops patches under mixed rotary tables"
            )

    def grid(self, model: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = model.embeds.dynamic_feat_size(image_size)
        return int(rows), int(columns)

    def num_tokens(self, model: Any, input_size: tuple[int, int] | None = None) -> int:
        pretrained_cfg = getattr(model, "pretrained_cfg", None)
        if input_size is None and pretrained_cfg:
            input_size = tuple(pretrained_cfg["input_size"][1:])
        rows, columns = self.grid(model, input_size) if input_size else model.embeds.pos_embed_grid_size
        return int(rows * columns) + self.num_prefix_tokens(model)

    def embed(self, model: Any, images: Any) -> Embedded:
        if isinstance(images, Mapping):
            return self._embed_patches(with_exact_grid(model), images)

        def embedded(model: Any) -> tuple[Tensor, Tensor | None]:
            made = model._forward_embeds(images, patch_coord=None, patch_valid=None, attn_mask=None)
            return made["patches"], made["rope_embeds"]

        return with_table(model, images, embedded)

    def _embed_patches(self, model: Any, images: Mapping[str, Tensor]) -> Embedded:
        if missing := {"patches", "patch_coord", "patch_valid"} - images.keys():
            raise ValueError(f"the dictionary lacks {', '.join(sorted(missing))}")
        if images.get("attn_mask") is not None:
            raise ValueError("the dictionary has an attn_mask, which merged tokens cannot follow; leave it out")
        patches, patch_coord, patch_valid = (images[name] for name in ("patches", "patch_coord", "patch_valid"))
        made = model._forward_embeds(patches, patch_coord, patch_valid.bool(), attn_mask=None)
        valid, positions = made["patch_valid"], made["rope_embeds"]
        prefix = valid.new_ones(len(valid), self.num_prefix_tokens(model))
        if positions is not None and model.rope_is_mixed:  # tables of block after block
            positions = torch.stack(list(positions))
        return Embedded(made["patches"], positions, torch.cat([prefix, valid], dim=1))

    def projection(self, model: Any, image_size: tuple[int, int]) -> Tensor | None:
        embeds = model.embeds
        if type(embeds) is not NaFlexEmbeds or type(embeds.proj) is not nn.Linear:
            return None
        weight, (patch, width) = embeds.proj.weight, embeds.patch_size
        normed = any(type(norm) is not nn.Identity for norm in (embeds.norm, model.norm_pre))
        if normed or not embeds.is_linear or embeds.norm_input is not None or patch != width:
            return None
        if any(side % patch for side in image_size):
            return None
        if not getattr(embeds, "channels_last", True):
            return weight.unflatten(1, (-1, patch, patch))  # type: ignore[no-any-return]
        by_pixel: Tensor = weight.unflatten(1, (patch, patch, -1))
        return by_pixel.permute(0, 3, 1, 2)

    def embed_colour(self, model: Any, colour: Tensor | None, image_size: tuple[int, int]) -> Embedded:
        weight = model.embeds.proj.weight
        image = weight.new_zeros(1, weight.shape[1] // model.embeds.patch_size[0] ** 2, *image_size)
        return self.embed(model, image if colour is None else image + colour.to(image.dtype)[:, None, None])

    def norm_pre(self, model: Any) -> nn.Module:
        return nn.Identity()  # `embed` has done it

    def position(self, model: Any, positions: Tensor | None, i: int) -> Position:
        return Position(rope=positions[i] if positions is not None and model.rope_is_mixed else positions)
