"""timm's rotary tables where timm itself fails: in half precision, and while a CUDA graph is recorded."""

from __future__ import annotations

from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tome_core.families.family import Embedded
from tome_core.kernels.side import is_recorded


class _Table:
    """Stands where a rotary embedding stood, and always gives the same table."""

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def get_embed(self, shape: object = None) -> Tensor:
        """The table, whatever the grid."""
        return self._table


_LATEST: WeakKeyDictionary[nn.Module, tuple[object, Tensor]] = WeakKeyDictionary()
"""By rotary embedding: the kind of patches that it was last asked for, and the table that it gave."""


def place(trunk: Any, patches: Tensor) -> Embedded:
    """The trunk's `_pos_embed`: patches, as the patch embedding leaves them, to tokens and a rotary table.

    Some tables are made on the host at every call (DINOv3's), which a recorded graph cannot do. There the table of the
    call before stands in, which warmed the recording up: without parameters, it is the same.
    """
    rope, kind = trunk.rope, (patches.shape[1:], patches.dtype, patches.device)
    if rope is None or torch.compiler.is_compiling() or next(rope.parameters(), None) is not None:
        return Embedded(*_with_exact_grid(trunk)._pos_embed(patches))
    latest, table = _LATEST.get(rope, (None, None))
    if is_recorded(patches) and latest == kind:
        return Embedded(*_with_rope(trunk, _Table(table))._pos_embed(patches))  # type: ignore[arg-type]
    x, table = trunk._pos_embed(patches)
    _LATEST[rope] = kind, table
    return Embedded(x, table)


def _with_exact_grid(trunk: Any) -> Any:
    """The trunk with the grid of a mixed rotary table in float32: in half precision timm fails, up to 1.0.29."""
    grid = getattr(trunk.rope, "t_x", None)
    if grid is None or not grid.is_floating_point() or grid.element_size() >= 4:
        return trunk
    rope = copy(trunk.rope)
    rope._buffers = {name: None if buffer is None else buffer.float() for name, buffer in rope._buffers.items()}
    return _with_rope(trunk, rope)


def _with_rope(trunk: Any, rope: Any) -> Any:
    """A shallow copy of the trunk with another rotary embedding: the trunk itself may be in use by other threads."""
    shallow = copy(trunk)
    shallow._modules = {name: module for name, module in trunk._modules.items() if name != "rope"}
    shallow.rope = rope
    return shallow
