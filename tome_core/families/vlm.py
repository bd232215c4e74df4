"""Classifiers over the vision towers of language models: timm's `Qwen3VitClassifier` and `DeepseekVitClassifier`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tome_core.families.family import Embedded, Family, UnsupportedModelError
from tome_core.families.rope import place
from tome_core.positions import Position

try:
    from timm.models.deepseek_vit import DeepseekVitClassifier
    from timm.models.qwen3_vit import Qwen3VitClassifier
except ImportError:  # older timm
    CLASSES: tuple[type[nn.Module], ...] = ()
else:
    CLASSES = (Qwen3VitClassifier, DeepseekVitClassifier)


class VisionTowerFamily(Family):
    """Adapter to classifiers that pool an encoder's patches; its projector to language tokens needs the whole grid."""

    model_classes = CLASSES
    positional = True
    pools = ("avg",)

    def trunk(self, model: Any) -> Any:
        return model.encoder

    def check(self, model: Any) -> None:
        super().check(model)
        if model.encoder_pool:
            raise UnsupportedModelError(
                f"cannot merge tokens in a {type(model).__name__} with encoder_pool={model.encoder_pool!r}, which "
                "joins neighbours of the patch grid; supported: ''"
            )

    def place(self, model: Any, patches: Tensor) -> Embedded:
        return place(model.encoder, patches)

    def position(self, model: Any, positions: Tensor | None, i: int) -> Position:
        return Position(rope=positions)

    def norm(self, model: Any) -> nn.Module:
        norm: nn.Module = getattr(model.encoder, "norm", nn.Identity())
        return norm

    def fc_norm(self, model: Any, x: Tensor) -> Tensor:
        normed: Tensor = model.norm(x)
        return normed
