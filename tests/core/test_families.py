"""Every timm model that `wrap` accepts: a token of size s acts as s copies of it do in timm's own code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tome_core import UnsupportedModelError, wrap

Build = Callable[..., VisionTransformer]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "distillation token": ("deit_tiny_distilled_patch16_224", {}),
    "LayerScale": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 84}),
    "norm before the blocks": ("vit_base_patch16_clip_224", {}),
    "q/k norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "norm inside attention": ("beit3_base_patch16_224", {}),
    "gated attention": ("vit_tiny_patch16_224", {}),
    "gated MLP": ("aimv2_large_patch14_224", {"img_size": 84}),
    "any image size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "avg pool": ("vit_medium_patch16_gap_240", {}),
    "avg pool, register, fc_norm": ("vit_medium_patch16_reg1_gap_256", {}),
    "avg pool, prefix pooled": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    "max pool": ("vit_tiny_patch16_224", {"global_pool": "max"}),
    "avgmax pool": ("vit_tiny_patch16_224", {"global_pool": "avgmax", "fc_norm": False}),
    "map pool": ("vit_base_patch16_siglip_224", {}),
    "map pool, registers": ("vit_so150m_patch16_reg4_map_256", {}),
    "map pool, prefix pooled": ("test_vit3", {}),
}
OTHER_BLOCKS = {
    "vit_base_patch16_18x2_224": "ParallelThingsBlock",
    "vit_base_patch16_rpn_224": "ResPostBlock",
    "vit_base_patch16_xp_224": "ParallelScalingBlock",
    "vit_dlittle_patch16_reg1_gap_256": "Block with DiffAttention",
    "vit_dpwee_patch16_reg1_gap_256": "DiffParallelScalingBlock",
    "vit_dwee_patch16_reg1_gap_256": "Block with DiffAttention",
    "vit_huge_patch14_xp_224": "ParallelScalingBlock",
    "vit_large_patch14_xp_224": "ParallelScalingBlock",
    "vit_pwee_patch16_reg1_gap_256": "ParallelScalingBlock",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock",
}
SWEEP = [
    name
    for name in timm.list_models()
    if inspect.signature(timm.models.model_entrypoint(name)).return_annotation
    in (VisionTransformer, VisionTransformerDistilled)
    and name not in OTHER_BLOCKS
]


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest, build: Build) -> VisionTransformer:
    name, overrides = VARIANTS[request.param]
    model = build(name, **overrides)
    blocks: list[Any] = list(model.blocks)
    if request.param == "gated attention":
        if "gated" not in inspect.signature(Attention).parameters:
            pytest.skip("this timm has no gated attention")
        for block in blocks:
            block.attn = Attention(48, 3, qkv_bias=True, gated=True).eval()
    return model


def images_for(model: VisionTransformer) -> Tensor:
    return torch.randn(2, 3, *model.patch_embed.img_size)


def tokens_for(model: VisionTransformer) -> tuple[Tensor, Tensor]:
    """Tokens of one image as if some had merged, (1, N, C), and their sizes, (1, N); prefix tokens have size 1."""
    num_tokens = wrap(model).num_tokens
    size = torch.randint(1, 6, (1, num_tokens)).float()
    size[:, : model.num_prefix_tokens] = 1
    return torch.randn(1, num_tokens, model.embed_dim), size


def copies(x: Tensor, size: Tensor) -> Tensor:
    """The tokens of one image, each as often as its size says."""
    return x.repeat_interleave(size[0].long(), dim=1)


def assert_block_sees_copies(model: VisionTransformer, x: Tensor, size: Tensor) -> None:
    family, block = wrap(model).family, model.blocks[1]
    first_copy = (size.cumsum(dim=1) - size).long()[0]
    expected = block(copies(x, size))[:, first_copy]
    attended, _ = family.attend(block, x, size)
    torch.testing.assert_close(family.feed_forward(block, attended), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(family.block(block, x, size), expected, rtol=1e-4, atol=1e-5)


def assert_head_sees_copies(model: VisionTransformer, x: Tensor, size: Tensor) -> None:
    expected = model.forward_head(copies(x, size))
    torch.testing.assert_close(wrap(model).family.head(model, x, size), expected, rtol=1e-4, atol=1e-5)


def test_r_0_is_timm_bit_for_bit(model: VisionTransformer) -> None:
    images = images_for(model)
    assert torch.equal(wrap(model)(images), model(images))


@pytest.mark.parametrize("r", [1, 5, 1000])
def test_tokens_merge_as_counted_and_logits_stay_finite(model: VisionTransformer, r: int) -> None:
    merged, images = wrap(model), images_for(model)
    tokens = merged.forward_features(images, r, track=True)
    assert tokens.size is not None and tokens.source is not None
    assert tokens.x.shape[1] == merged.token_counts(r)[-1]
    assert tokens.size.sum(1).tolist() == [merged.num_tokens] * 2
    assert tokens.source[:, : model.num_prefix_tokens].tolist() == [list(range(model.num_prefix_tokens))] * 2
    logits = merged(images, r)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


def test_a_block_treats_a_size_as_that_many_copies(model: VisionTransformer) -> None:
    assert_block_sees_copies(model, *tokens_for(model))


def test_the_head_treats_a_size_as_that_many_copies(model: VisionTransformer) -> None:
    assert_head_sees_copies(model, *tokens_for(model))


@pytest.mark.parametrize("pool", ["avg", "avgmax"])
def test_autocast_does_not_lower_the_weighted_mean(build: Build, pool: str) -> None:
    model = build("vit_medium_patch16_gap_240", global_pool=pool, num_classes=0)
    family, (x, size) = wrap(model).family, tokens_for(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = family.head(model, x, size)
    assert torch.equal(lowered, family.head(model, x, size))


def test_the_metric_is_the_keys_averaged_over_heads(model: VisionTransformer) -> None:
    block: Any = model.blocks[1]
    x, _ = tokens_for(model)
    keys: list[Tensor] = []
    with block.attn.k_norm.register_forward_hook(lambda module, inputs, output: keys.append(output)):
        block(x)
    torch.testing.assert_close(wrap(model).family.attend(block, x, None)[1], keys[0].mean(dim=1))


def test_merging_identical_patches_changes_nothing(model: VisionTransformer) -> None:
    if model.pos_embed is not None:
        nn.init.zeros_(model.pos_embed)
    image = torch.randn(1, 3, 1, 1).expand_as(images_for(model))
    for r in (4, 7, 1000):
        torch.testing.assert_close(wrap(model)(image, r), model(image), rtol=0, atol=1e-4)


def test_training_drops_what_timm_drops(build: Build) -> None:
    model = build(drop_path_rate=0.3, proj_drop_rate=0.3, attn_drop_rate=0.3).train()
    family, block, x = wrap(model).family, model.blocks[-1], torch.randn(4, 37, 48)
    torch.manual_seed(1)
    expected = block(x)
    torch.manual_seed(1)
    attended, _ = family.attend(block, x, None)
    torch.testing.assert_close(family.feed_forward(block, attended), expected)


def test_a_model_of_any_image_size_merges_at_any(build: Build) -> None:
    model = build(dynamic_img_size=True)
    images = torch.randn(2, 3, 96, 160)  # 60 patches, where the model's own size has 36
    assert torch.equal(wrap(model)(images), model(images))
    assert [wrap(model).forward_features(images, r).x.shape[1] for r in (0, 4, 1000)] == [61, 49, 9]


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="counted by building every model of timm 1.0.31")
def test_the_sweep_misses_no_name() -> None:
    assert len(SWEEP) == 196


@pytest.mark.parametrize("name", SWEEP)
@torch.inference_mode()
def test_every_registered_name_is_right(build: Build, name: str) -> None:
    size: dict[str, Any] = {"img_size": 224, "depth": 2}  # divides into patches of 8, 14, 16 and 32
    if name.startswith("vitamin_") or name == "vit_base_mci_224":
        size |= {"embed_dim": None, "num_heads": None}  # the width is that of the stem
    model = build(name, **size)
    merged, image = wrap(model), torch.randn(1, 3, *model.patch_embed.img_size)
    torch.testing.assert_close(merged(image), model(image), rtol=1e-5, atol=1e-6)

    tokens = merged.forward_features(image, 4)
    assert tokens.size is not None
    assert tokens.x.shape[1] == merged.num_tokens - 8
    assert merged(image, 4).isfinite().all()
    assert_block_sees_copies(model, tokens.x, tokens.size)
    assert_head_sees_copies(model, tokens.x, tokens.size)


@pytest.mark.parametrize(("name", "made_of"), [row for row in OTHER_BLOCKS.items() if timm.is_model(row[0])])
def test_other_blocks_are_refused(build: Build, name: str, made_of: str) -> None:
    model = build(name, depth=2)
    with pytest.raises(
        UnsupportedModelError, match=f"VisionTransformer made of {made_of}.*supported: Block with Atten"
    ):
        wrap(model)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("eva02_tiny_patch14_224", "Eva"),
        ("beit_base_patch16_224", "Beit"),
        ("cait_xxs24_224", "Cait"),
        ("pit_ti_224", "PoolingVisionTransformer"),
        ("naflexvit_base_patch16_gap", "NaFlexVit"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
        ("resnet18", "ResNet"),
    ],
)
def test_other_models_are_refused(name: str, cls: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match=f"a {cls}; supported timm classes: VisionTransformer, Vis"):
        wrap(model)


class Subclass(VisionTransformer):
    """A VisionTransformer that may compute something else."""


def test_subclasses_other_modules_and_wrapped_models_are_refused(build: Build) -> None:
    for model, cls in ((Subclass(depth=1), "Subclass"), (nn.Linear(2, 2), "Linear"), (wrap(build()), "MergedViT")):
        with pytest.raises(UnsupportedModelError, match=f"a {cls}; supported timm classes: VisionTransformer, Vis"):
            wrap(model)


@pytest.mark.parametrize("pool", ["prr", ""])
def test_poolings_without_a_weighted_form_are_refused(build: Build, pool: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"VisionTransformer with global_pool='{pool}'; supported: token, a"
    ):
        wrap(build(global_pool=pool))


def test_an_attention_pool_with_positions_is_refused(build: Build) -> None:
    model = build("vit_base_patch16_siglip_224")
    model.attn_pool.pos_embed = nn.Parameter(torch.zeros(36, 48))
    with pytest.raises(UnsupportedModelError, match="VisionTransformer whose attention pool adds position embeddings"):
        wrap(model)
