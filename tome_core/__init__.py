"""Token merging for timm Vision Transformers, as a library: `merged = wrap(model)`, then `merged(images, r=8)`.

It knows no HTTP, no asyncio and no environment.
"""

from tome_core.families import UnsupportedModelError
from tome_core.matching import MergePlan, match
from tome_core.merging import merge, track_source, unmerge
from tome_core.schedule import Ramp
from tome_core.vit import MergedViT, Tokens, wrap

__all__ = [
    "MergePlan",
    "MergedViT",
    "Ramp",
    "Tokens",
    "UnsupportedModelError",
    "match",
    "merge",
    "track_source",
    "unmerge",
    "wrap",
]
