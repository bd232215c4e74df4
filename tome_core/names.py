"""timm's names of the models in which tokens can merge. They are read from timm's source, without an import."""

from __future__ import annotations

import fnmatch
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

COVERS = {
    "VisionTransformer": "ViT, DeiT, DeiT-3, BEiT-3, DINOv2, AIMv2, FlexiViT, hybrids, ViTamin, CLIP and SigLIP towers",
    "VisionTransformerDistilled": "DeiT with a distillation token",
    "Eva": "EVA, EVA-02, DINOv3, ROPE-ViT, Sapiens2, Perception Encoder",
    "NaFlexVit": "NaFlexVit: images of any size and shape",
    "VisionTransformerRelPos": "ViT with relative positions",
    "Beit": "BEiT, BEiT v2",
    "Qwen3VitClassifier": "classifiers over the vision tower of Qwen3-VL",
    "DeepseekVitClassifier": "classifiers over the vision tower of DeepSeek",
}
"""timm's classes that `wrap` takes, and the common names of their models."""

REFUSED = ("_merge", "_align")
"""Suffixes of models that keep the projector of a language model, which needs the whole grid of patches."""

_ENTRY = re.compile(r"^@register_model\s+def (\w+)\([^)]*\)\s*->\s*['\"]?(\w+)", re.MULTILINE)


def list_models(pattern: str = "*") -> list[str]:
    """timm's names of the models that `wrap` takes, in order.

    Args:
        pattern: A pattern for names, such as "vit_*_224"; without a wildcard, a part of them.
    """
    pattern = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    return fnmatch.filter(classes(), pattern)


@cache
def classes() -> dict[str, str]:
    """The timm class of every name that `list_models` knows."""
    spec = find_spec("timm")
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in Path(folder, "models").glob("*.py")]
    found = {name: cls for file in files for name, cls in _ENTRY.findall(file.read_text("utf-8")) if cls in COVERS}
    return {name: found[name] for name in sorted(found, key=_natural) if not name.endswith(REFUSED)}


def page() -> str:
    """The text of docs/supported.md."""
    lines = [
        "# Supported models",
        f'Tokens merge in {len(classes())} of timm\'s models. `tome_core.list_models("dinov3")` and',
        "`tome-server models --supported dinov3` search them, in the timm that is installed. This page is made by",
        "`python -m tome_core.names > docs/supported.md`.",
    ]
    for cls, known_as in COVERS.items():
        names = [name for name, its in classes().items() if its == cls]
        lines += ["", f"## {cls}: {len(names)}", f"{known_as[0].upper()}{known_as[1:]}.", "```", *names, "```"]
    return "\n".join(lines)


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key for timm's order: patch8 before patch16."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


if __name__ == "__main__":
    print(page())
