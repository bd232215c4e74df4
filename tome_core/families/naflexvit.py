"""timm's `NaFlexVit`, given plain images: every token is a patch of the image, none is padding."""

from __future__ import annotations

from typing import Any

from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from tome_core.families.family import Embedded, Family, UnsupportedModelError
from tome_core.positions import NOWHERE, Position


class NaFlexFamily(Family):
    """Adapter to `NaFlexVit`."""

    model_classes: tuple[type[nn.Module], ...] = (NaFlexVit,)
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

    def num_tokens(self, model: Any) -> int:
        rows, columns = self.grid(model, tuple(model.pretrained_cfg["input_size"][1:]))
        return rows * columns + self.num_prefix_tokens(model)

    def embed(self, model: Any, images: Tensor) -> Embedded:
        embedded = model._forward_embeds(images, patch_coord=None, patch_valid=None, attn_mask=None)
        return Embedded(embedded["patches"], embedded["rope_embeds"])

    def position(self, model: Any, positions: Tensor | None, i: int) -> Position:
        if positions is None:
            return NOWHERE
        return Position(rope=positions[i] if model.rope_is_mixed else positions)
