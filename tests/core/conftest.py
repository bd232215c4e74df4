"""Small timm models whose every parameter matters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import timm
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer

from benchmarks.coverage import randomise
from tests.core.recording import Calls, Event
from tests.core.variants import VARIANTS, Case
from tome_core import recorded, wrap
from tome_core.kernels import launch

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


@pytest.fixture(params=VARIANTS)
def case(request: pytest.FixtureRequest, build: Callable[..., Any]) -> Case:
    name, overrides = VARIANTS[request.param]
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    if "num_kv_heads" in overrides and "num_kv_heads" not in inspect.signature(timm.models.eva.Eva).parameters:
        pytest.skip("this timm has no grouped queries")
    model = build(name, **overrides)
    if request.param == "gated attention":
        if "gated" not in inspect.signature(Attention).parameters:
            pytest.skip("this timm has no gated attention")
        for block in model.blocks:
            block.attn = Attention(48, 3, qkv_bias=True, gated=True).eval()
    side = overrides.get("img_size", 96)
    return Case(model, wrap(model), torch.randn(2, 3, side, side))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stands in for CUDA graphs."""
    calls = Calls()
    monkeypatch.setattr(recorded, "_can_record", lambda images: not torch.is_grad_enabled())
    monkeypatch.setattr(recorded, "CudaRecorder", lambda: calls)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    return calls


@pytest.fixture(scope="module")
def by_kernels() -> Iterator[None]:
    """Operations by their Triton kernels, which a machine without a GPU runs by Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "missing_on", lambda device: None)
        yield
