"""timm's `VisionTransformerRelPos`: a bias for each pair of positions, from a table or a small network."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from tome_core.families.family import Embedded, Family
from tome_core.positions import Position


class RelPosFamily(Family):
    """Adapter to `VisionTransformerRelPos`; all blocks share one bias, or each block has its own."""

    model_classes: tuple[type[nn.Module], ...] = (VisionTransformerRelPos,)
    positional = True
    pools = ("token", "avg")

    def place(self, model: Any, patches: Tensor) -> Embedded:
        x = patches
        if model.cls_token is not None:
            x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
        return Embedded(x, model.shared_rel_pos.get_bias() if model.shared_rel_pos is not None else None)

    def position(self, model: Any, positions: Tensor | None, i: int) -> Position:
        own = model.blocks[i].attn.rel_pos
        return Position(bias=own.get_bias() if own is not None else positions, grid=model.patch_embed.grid_size)
