"""Every name of timm: either right under merging, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from benchmarks.coverage import examine, says_supported
from tome_core import UnsupportedModelError, wrap

Build = Callable[..., Any]

SWEEP = [name for name in timm.list_models() if says_supported(name)]


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="counted by building every model of timm 1.0.31")
def test_the_sweep_misses_no_name() -> None:
    assert len(SWEEP) == 314


@pytest.mark.parametrize("name", SWEEP)
def test_every_registered_name_is_right_or_refused(name: str) -> None:
    verdict = examine(name)
    assert verdict.refused or (verdict.equal and verdict.merged), verdict.reason
    assert verdict.refused == name.endswith(("_merge", "_align"))


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
