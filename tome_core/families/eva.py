"""timm's `Eva`: EVA, EVA-02, DINOv3, ROPE-ViT, Perception Encoder. Rotary embeddings follow their tokens."""

from __future__ import annotations

from typing import Any

from timm.models.eva import Eva
from torch import Tensor, nn

from tome_core.families.family import Embedded, Family
from tome_core.families.rope import place
from tome_core.positions import Position


class EvaFamily(Family):
    """Adapter to `Eva`; all blocks share one rotary table, or ("mixed") each block and head has its own."""

    model_classes: tuple[type[nn.Module], ...] = (Eva,)
    positional = True

    def place(self, model: Any, patches: Tensor) -> Embedded:
        return place(model, patches)

    def position(self, model: Any, positions: Tensor | None, i: int) -> Position:
        return Position(rope=positions[i] if positions is not None and model.rope_mixed else positions)

    def pools_prefix(self, model: Any) -> bool:
        return bool(model.global_pool == "map")  # its attention pool sees every token
