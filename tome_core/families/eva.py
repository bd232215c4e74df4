"""timm's `Eva`: EVA, EVA-02, DINOv3, ROPE-ViT, Perception Encoder. Rotary embeddings follow their tokens."""

from __future__ import annotations

from copy import copy
from typing import Any

from timm.models.eva import Eva
from torch import Tensor, nn

from tome_core.families.family import Embedded, Family
from tome_core.positions import Position


class EvaFamily(Family):
    """Adapter to `Eva`; its rotary table is one for all blocks, or ("mixed") one for each block and head."""

    model_classes: tuple[type[nn.Module], ...] = (Eva,)
    positional = True

    def place(self, model: Any, patches: Tensor) -> Embedded:
        return Embedded(*_with_exact_grid(model)._pos_embed(patches))

    def position(self, model: Any, positions: Tensor | None, i: int) -> Position:
        return Position(rope=positions[i] if positions is not None and model.rope_mixed else positions)

    def pools_prefix(self, model: Any) -> bool:
        return bool(model.global_pool == "map")  # its attention pool sees every token


def _with_exact_grid(model: Any) -> Any:
    """The model with the grid of a mixed rotary table in float32: in half precision timm fails, up to 1.0.29."""
    grid = getattr(model.rope, "t_x", None)
    if grid is None or not grid.is_floating_point() or grid.element_size() >= 4:
        return model
    rope, shallow = copy(model.rope), copy(model)
    rope._buffers = {name: None if buffer is None else buffer.float() for name, buffer in rope._buffers.items()}
    shallow._modules = {**model._modules, "rope": rope}
    return shallow
