"""timm's `Beit`: BEiT and BEiT v2, with a bias for each pair of positions from a table."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from tome_core.families.family import Embedded, Family
from tome_core.positions import Position


class BeitFamily(Family):
    """Adapter to `Beit`; its blocks have a table each, share one, or both."""

    model_classes: tuple[type[nn.Module], ...] = (Beit,)
    positional = True
    pools = ("token", "avg")

    def place(self, model: Any, patches: Tensor) -> Embedded:
        x = torch.cat([model.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        if model.pos_embed is not None:
            x = x + model.pos_embed
        shared = model.rel_pos_bias() if model.rel_pos_bias is not None else None
        return Embedded(model.pos_drop(x), shared[None] if shared is not None and shared.ndim == 3 else shared)

    def position(self, model: Any, positions: Tensor | None, i: int) -> Position:
        attn, bias = model.blocks[i].attn, positions
        if attn.relative_position_bias_table is not None:
            own = attn._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return Position(bias=bias, grid=model.patch_embed.grid_size)
