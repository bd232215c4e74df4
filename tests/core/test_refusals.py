"""Every name of timm: either right under merging, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import swin_t, vit_b_16

from benchmarks.coverage import examine, says_supported
from tome_core import UnsupportedModelError, list_models, wrap

Build = Callable[..., Any]

SWEEP = [name for name in timm.list_models() if says_supported(name)]


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="counted by building every model of timm 1.0.31")
def test_the_sweep_misses_no_name() -> None:
    assert len(SWEEP) == 314


@pytest.mark.parametrize("name", SWEEP)
def test_every_registered_name_is_right_or_refused(name: str) -> None:
    verdict = examine(name)
    assert verdict.refused or (verdict.equal and verdict.merged), verdict.reason
    assert verdict.refused == (name not in list_models())


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("cait_xxs24_224", "Cait"),
        ("pit_ti_224", "PoolingVisionTransformer"),
        ("samvit_base_patch16", "VisionTransformerSAM"),
        ("resnet18", "ResNet"),
    ],
)
def test_other_models_are_refused(name: str, cls: str) -> None:
    verdict = examine(name)
    assert (verdict.refused, verdict.cls) == (True, cls)
    assert f"a {cls}; supported timm classes: VisionTransformer, VisionTransformerDistilled, Eva" in verdict.reason


class Subclass(VisionTransformer):
    """A VisionTransformer that may compute something else."""


def test_subclasses_other_modules_and_wrapped_models_are_refused(build: Build) -> None:
    for model, cls in ((Subclass(depth=1), "Subclass"), (nn.Linear(2, 2), "Linear"), (wrap(build()), "MergedViT")):
        with pytest.raises(UnsupportedModelError, match=f"a {cls}; supported timm classes: VisionTransformer, Vis"):
            wrap(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (vit_b_16, r"in torchvision's VisionTransformer; take timm's: timm.create_model\('vit_base_patch16_224', pre"),
        (swin_t, r"in torchvision's SwinTransformer; take timm's: one of tome_core.list_models\('vit'\)"),
        (lambda: hugging_face("vit", 768, 16, 224), r"in transformers's ForImages; .*\('vit_base_patch16_224', pre"),
        (lambda: hugging_face("vit", 768, 12, 224), r"take timm's: one of tome_core.list_models\('vit'\)"),
        (lambda: hugging_face("dinov3_vit", 384, 16, 224), r"take timm's: one of tome_core.list_models\('dinov3'\)"),
        (lambda: nn.DataParallel(VisionTransformer(depth=1)), "a DataParallel; supp.*; it holds one: wrap its .module"),
        (lambda: torch.compile(VisionTransformer(depth=1)), "a OptimizedModule; .*; it holds one: wrap its ._orig_mod"),
        (lambda: hugging_face("timm_wrapper"), "a ForImages; supp.*; it holds one: wrap its .timm_model"),
        (lambda: wrap(VisionTransformer(depth=1)), "a MergedViT; supported timm .*; it merges already, by its r"),
    ],
)
def test_a_model_of_another_library_is_refused_with_the_way_from_there(
    model: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        wrap(model())


def hugging_face(model_type: str, hidden_size: int = 0, patch_size: int = 0, image_size: int = 0) -> nn.Module:
    """A model of a class as transformers has them."""
    cls: Any = type("ForImages", (nn.Module,), {"__module__": f"transformers.models.{model_type}.modeling"})
    model = cls()
    sizes = {"hidden_size": hidden_size, "patch_size": patch_size, "image_size": image_size}
    model.config = SimpleNamespace(model_type=model_type, **sizes)
    if model_type == "timm_wrapper":
        model.timm_model = VisionTransformer(depth=1)
    return model  # type: ignore[no-any-return]


def test_the_names_that_a_refusal_points_to_exist() -> None:
    for word in ("vit", "dinov3", "dinov2", "deit", "beit", "siglip", "clip"):
        assert list_models(word)


def test_unknown_blocks_and_attentions_are_refused(build: Build) -> None:
    model = build()
    model.blocks[1] = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="VisionTransformer made of Identity; supported blocks: Block, Dee"):
        wrap(model)
    model = build()
    model.blocks[1].attn = nn.Linear(48, 48)
    with pytest.raises(UnsupportedModelError, match="made of Block with Linear; supported: Attention, AttentionRope"):
        wrap(model)


@pytest.mark.parametrize("pool", ["prr", ""])
def test_poolings_without_a_weighted_form_give_features_but_no_classes(build: Build, pool: str) -> None:
    merged, images = wrap(build(global_pool=pool)), torch.randn(1, 3, 96, 96)
    assert merged.forward_tokens(images, 4).x.shape == (1, 25, 48)
    assert len(merged.forward_intermediates(images, 3, r=4)[1]) == 3
    for classify in (merged, lambda images: merged.forward_head(merged.forward_tokens(images))):
        with pytest.raises(UnsupportedModelError, match=f"VisionTransformer with global_pool='{pool}'; supported: tok"):
            classify(images)


def test_an_attention_pool_with_positions_is_refused(build: Build) -> None:
    model = build("vit_base_patch16_siglip_224")
    model.attn_pool.pos_embed = nn.Parameter(torch.zeros(36, 48))
    with pytest.raises(UnsupportedModelError, match="global_pool='map' that adds position embeddings"):
        wrap(model)(torch.randn(1, 3, 96, 96))


@pytest.mark.parametrize(
    ("name", "pool", "message"),
    [
        ("vit_medium_patch16_gap_240", "token", "it has no class token"),
        ("beit_base_patch16_224", "max", "supported: token, avg"),
        ("vit_relpos_small_patch16_224", "avgmax", "supported: token, avg"),
        ("vit_pe_core_base_patch16_224", "token", "and an attention pool"),
        ("vit_pe_core_base_patch16_224", "avg", "and an attention pool"),
        ("vit_tiny_patch16_224", "map", "and no attention pool"),
    ],
)
def test_a_pooling_that_the_model_is_not_made_for_is_refused(build: Build, name: str, pool: str, message: str) -> None:
    """Some versions of timm let a head be reset to what they then do not do."""
    model = build(name)
    model.global_pool = pool
    with pytest.raises(UnsupportedModelError, match=message):
        wrap(model)(torch.randn(1, 3, 96, 96))


def test_dropped_patches_under_tables_of_each_head_are_refused(build: Build) -> None:
    model = build("naflexvit_base_patch16_gap", rope_type="mixed", patch_drop_rate=0.5)
    with pytest.raises(UnsupportedModelError, match="NaFlexVit that drops patches"):
        wrap(model)
