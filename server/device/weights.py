"""Reads the weights of a safetensors file for a model, after a comparison of names and shapes. No pickle is read."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from server.documents import sentence
from server.errors import SettingsError, shown
from tome_core.tuned import FORMAT

logger = logging.getLogger(__name__)

_POSITIONS = "pos_embed"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Shapes = Mapping[str, tuple[int, ...]]


def read_weights(file: Path, model: Any) -> dict[str, Tensor]:
    """The tensors of a file by the names of the model.

    A prefix that all names share (`module.`, `model.`, `_orig_mod.`) is taken off. Learned position embeddings for
    images of another size are resampled, as timm does.

    Args:
        file: A safetensors file.
        model: A timm model. Only its shapes are used: its tensors may be on the meta device.

    Raises:
        SettingsError: It is not a safetensors file, or its weights do not fit the model.
    """
    if not file.is_file():
        raise SettingsError(f"there is no weights file {file}")
    try:
        with safe_open(file, framework="pt") as opened:
            if (opened.metadata() or {}).get("format") == FORMAT:
                raise SettingsError(f"{file} holds tuned numbers, which go with weights; give it with tuned=")
            names = list(opened.keys())
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
            wanted: dict[str, Tensor] = model.state_dict()
            prefix = _prefix(file, names, wanted)
            ours = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
            resampled = _compare(file, ours, wanted, model)
            state = {name: opened.get_tensor(prefix + name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise SettingsError(
            f"{file} is not a safetensors file ({sentence(error)}); weights are read from safetensors only"
        ) from error
    for name, tensor in state.items():
        state[name] = _converted(tensor, wanted[name].dtype, f"{file}: {name}")
    if resampled:
        state[_POSITIONS] = _resampled(state[_POSITIONS], model)
    return state


def _prefix(file: Path, names: Collection[str], wanted: Collection[str]) -> str:
    """The common prefix of most names in a file."""
    if set(wanted) <= set(names):
        return ""
    found = Counter(
        name.removesuffix(key) for name in names for key in wanted if name == key or name.endswith(f".{key}")
    )
    ranked = found.most_common(2)
    if not ranked:
        raise SettingsError(
            f"{file} holds the weights of another model: none of its {len(names)} tensors has a name of this model"
        )
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1] and "" not in dict(ranked):
        several = " and ".join(sorted(repr(prefix) for prefix, _ in ranked))
        raise SettingsError(f"{file} holds several sets of weights, named {several}; it must hold one")
    return "" if found[""] == ranked[0][1] else ranked[0][0]


def _compare(file: Path, ours: Shapes, wanted: Mapping[str, Tensor], model: Any) -> bool:
    """Refuses a file whose names and shapes differ from the model's; returns whether only its positions differ."""
    differences = []
    if missing := [name for name in wanted if name not in ours]:
        differences.append(f"they lack {_some(missing)}")
    if extra := [name for name in ours if name not in wanted]:
        differences.append(f"they have {_some(extra)}, which the model lacks")
    both = {name: (ours[name], tuple(tensor.shape)) for name, tensor in wanted.items() if name in ours}
    other = {name: (here, there) for name, (here, there) in both.items() if here != there}
    if not differences and set(other) == {_POSITIONS} and _old_grid(other[_POSITIONS][0], model):
        return True
    if other:
        classes = {(here[:1], there[:1]) for here, there in other.values()}
        if len(classes) == 1 and (sizes := classes.pop())[1] == (model.num_classes,) and sizes[0]:
            differences.append(f"they are for {sizes[0][0]} classes, and it has {model.num_classes}")
        else:
            name, (here, there) = next(iter(other.items()))
            more = f" and {len(other) - 1} more" if len(other) > 1 else ""
            differences.append(f"{name} is {_size(here)} in the file and {_size(there)} in the model{more}")
    if differences:
        raise SettingsError(f"the weights in {file} do not fit the model: {'; '.join(differences)}")
    return False


def _old_grid(shape: tuple[int, ...], model: Any) -> tuple[int, int] | None:
    """Rows and columns of patches that position embeddings of this shape are for; None if that is not clear."""
    wanted = model.pos_embed.shape
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or len(shape) != 3 or len(wanted) != 3 or shape[::2] != tuple(wanted[::2]):
        return None
    side = math.isqrt(max(shape[1] - _prefix_tokens(model), 0))
    return (side, side) if side and side * side == shape[1] - _prefix_tokens(model) else None


def _converted(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """A tensor in the model's type, if that keeps its values."""
    if tensor.dtype not in (_FLOATS if dtype in _FLOATS else (dtype,)):
        allowed = "float16, bfloat16, float32 or float64" if dtype in _FLOATS else _kind(dtype)
        raise SettingsError(f"{where} is of type {_kind(tensor.dtype)}; it must be {allowed}")
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise SettingsError(f"{where} holds NaN or infinity")
    return tensor


def _prefix_tokens(model: Any) -> int:
    """Number of position embeddings that belong to no patch."""
    return 0 if getattr(model, "no_embed_class", False) else int(model.num_prefix_tokens)


def _resampled(positions: Tensor, model: Any) -> Tensor:
    old = _old_grid(tuple(positions.shape), model)
    assert old is not None
    new = tuple(model.patch_embed.grid_size)
    logger.warning("position embeddings are resampled from %d x %d to %d x %d patches", *old, *new)
    resampled: Tensor = resample_abs_pos_embed(
        positions, new_size=list(new), old_size=list(old), num_prefix_tokens=_prefix_tokens(model)
    )
    return resampled


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(shown(name) for name in names[:2]) + more


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
