"""Token merging for timm Vision Transformers, as a library: `merged = wrap(model)`, then `merged(images, r=8)`.

It has no HTTP, no asyncio and no settings. Names load on first use, so that code that needs only schedules
(`tome_core.schedule`) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tome_core.export import ExportError, export_onnx, export_program
    from tome_core.families import UnsupportedModelError
    from tome_core.fixed import FixedR
    from tome_core.matching import MergePlan, match
    from tome_core.merging import merge, track_source, unmerge
    from tome_core.names import list_models
    from tome_core.patching import patch
    from tome_core.recorded import Recorded
    from tome_core.schedule import Ramp
    from tome_core.tokens import Tokens
    from tome_core.vit import MergedViT, wrap

_HOME = {
    "ExportError": "export",
    "FixedR": "fixed",
    "MergePlan": "matching",
    "MergedViT": "vit",
    "Ramp": "schedule",
    "Recorded": "recorded",
    "Tokens": "tokens",
    "UnsupportedModelError": "families",
    "export_onnx": "export",
    "export_program": "export",
    "list_models": "names",
    "match": "matching",
    "merge": "merging",
    "patch": "patching",
    "track_source": "merging",
    "unmerge": "merging",
    "wrap": "vit",
}

__all__ = [
    "ExportError",
    "FixedR",
    "MergePlan",
    "MergedViT",
    "Ramp",
    "Recorded",
    "Tokens",
    "UnsupportedModelError",
    "export_onnx",
    "export_program",
    "list_models",
    "match",
    "merge",
    "patch",
    "track_source",
    "unmerge",
    "wrap",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'tome_core' has no attribute {name!r}")
    return getattr(import_module(f"tome_core.{_HOME[name]}"), name)
