"""Small timm models whose every parameter matters, and hypothesis without deadlines: a busy machine is no bug."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import timm
import torch
from hypothesis import settings
from timm.models.vision_transformer import VisionTransformer

from benchmarks.coverage import randomise
from tome_core.kernels import launch

settings.register_profile("core", deadline=None)
settings.load_profile("core")

SMALL: dict[str, Any] = {"img_size": 96, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10}


@pytest.fixture(scope="session")
def build() -> Callable[..., VisionTransformer]:
    """Builds `build(name, **overrides)`: a registered timm model made small, in eval mode, with random parameters."""

    def build(name: str = "vit_tiny_patch16_224", **overrides: Any) -> VisionTransformer:
        torch.manual_seed(0)
        model = cast(VisionTransformer, timm.create_model(name, **(SMALL | overrides)).eval())
        randomise(model)
        return model

    return build


@pytest.fixture(scope="module")
def by_kernels() -> Iterator[None]:
    """Operations by their Triton kernels, which a machine without a GPU runs by Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "missing_on", lambda device: None)
        yield
