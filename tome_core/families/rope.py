"""timm's rotary tables where timm itself fails: in half precision, and while a CUDA graph is recorded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tome_core.families.family import Embedded
from tome_core.kernels.side import is_recorded


class _Table:
    """Replaces a rotary embedding, and always gives the same table."""

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def get_embed(self, shape: object = None) -> Tensor:
        """The table, for any grid."""
        return self._table


MOST_KINDS = 16
"""Kinds of input whose tables are kept for a rotary embedding; a new one replaces the oldest."""

_TABLES: WeakKeyDictionary[nn.Module, OrderedDict[object, Tensor]] = WeakKeyDictionary()
"""The tables that a rotary embedding gave, by the kind of input."""


def place(trunk: Any, patches: Tensor) -> Embedded:
    """The trunk's `_pos_embed`: patches of the patch embedding to tokens and a rotary table."""
    return with_table(trunk, patches, lambda trunk: trunk._pos_embed(patches))


def with_table(trunk: Any, inputs: Tensor, embed: Callable[[Any], tuple[Tensor, Tensor | None]]) -> Embedded:
    """The result of `embed` for a trunk, with a rotary embedding that can be recorded.

    Some tables are made on the host at every call (DINOv3's), which a recorded graph cannot do. It uses the table of
    the warm-up call instead, which is the same, because it has no parameters.

    Args:
        trunk: Has the rotary embedding, or None, as `rope`.
        inputs: Their shape, dtype and device determine the table.
        embed: Gives tokens and table of a trunk.
    """
    rope, kind = trunk.rope, (inputs.shape[1:], inputs.dtype, inputs.device)
    if rope is None or torch.compiler.is_compiling() or next(rope.parameters(), None) is not None:
        return Embedded(*embed(with_exact_grid(trunk)))
    tables = _TABLES.setdefault(rope, OrderedDict())
    known = tables.get(kind)
    if known is not None and is_recorded(inputs):
        return Embedded(*embed(_with_rope(trunk, _Table(known))))
    x, table = embed(trunk)
    if type(table) is Tensor:
        tables[kind] = table
        if len(tables) > MOST_KINDS:
            tables.popitem(last=False)
    return Embedded(x, table)


def with_exact_grid(trunk: Any) -> Any:
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
