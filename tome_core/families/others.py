"""The message for a model that no family serves: its library, and which of timm's models to take instead."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import timm
from torch import nn

WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
"""timm's words for the widths of plain Vision Transformers."""


def refusal(model: nn.Module, supported: Sequence[type[nn.Module]]) -> str:
    """Why tokens cannot merge in a model of a class that no family serves, and what to do about it.

    Args:
        model: The model.
        supported: The classes that families serve.
    """
    name = type(model).__name__
    if (library := _library(model)) is not None:
        return f"cannot merge tokens in {library}'s {name}; take timm's: {_of_timm(model)}"
    names = ", ".join(cls.__name__ for cls in supported)
    said = f"cannot merge tokens in a {name}; supported timm classes: {names}"
    inside = [name for name, child in model.named_children() if type(child) in supported]
    if hasattr(type(model), "r") and (inside or isinstance(model, tuple(supported))):
        return f"{said}; it merges already, by its r"
    return f"{said}; it holds one: wrap its .{inside[0]}" if inside else said


def _library(model: nn.Module) -> str | None:
    """The library that a model's class, or a class that it extends, comes from; None if it is unknown."""
    roots = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if hasattr(model, "timm_model"):  # transformers' wrapper of timm's models
        return None
    return next((library for library in ("torchvision", "transformers") if library in roots), None)


def _of_timm(model: Any) -> str:
    """How to get timm's model that is most like one of torchvision or transformers."""
    config = getattr(model, "config", model)
    width = getattr(config, "hidden_size", getattr(config, "hidden_dim", None))
    kind = re.match("[a-z]*[0-9]*", getattr(config, "model_type", "vit"))
    word = kind[0] if kind else "vit"
    patch, side = getattr(config, "patch_size", None), getattr(config, "image_size", None)
    name = f"vit_{WIDTHS.get(width)}_patch{patch}_{side}" if width in WIDTHS and word == "vit" else ""
    if name and timm.is_model(name):
        return f"timm.create_model({name!r}, pretrained=True)"
    return f"one of tome_core.list_models({word!r})"
