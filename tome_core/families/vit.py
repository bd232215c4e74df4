"""timm's `VisionTransformer`: ViT, DeiT and its distilled form, DeiT-3, DINOv2, registers, SigLIP and CLIP towers."""

from __future__ import annotations

from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tome_core.families.family import Embedded, Family


class ViTFamily(Family):
    """Adapter to `VisionTransformer` and `VisionTransformerDistilled`, with any kind of block."""

    model_classes: tuple[type[nn.Module], ...] = (VisionTransformer, VisionTransformerDistilled)

    def place(self, model: Any, patches: Tensor) -> Embedded:
        return Embedded(model.patch_drop(model._pos_embed(patches)))
