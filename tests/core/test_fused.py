"""The forward loop by fused operations: what the plain one computes, in every family, and told when and why."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn

import tome_core
from benchmarks import coverage
from tome_core import MergedViT, kernels, vit
from tome_core.families.parts import parts_of

Build = Callable[..., Any]

NAMES = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_gap_224",
    "vit_base_patch16_clip_224",  # a norm before the first block
    "vit_base_patch16_siglip_224",  # an attention pool, no class token
    "deit3_small_patch16_224",  # LayerScale, no position for the class token
    "deit_tiny_distilled_patch16_224",
    "vit_base_r26_s32_224",  # a stem of convolutions
    "vitamin_base_224",
    "test_vit4",  # RMSNorm
    "aimv2_large_patch14_224",  # RMSNorm and SwiGLU
    "beit3_base_patch16_224",  # norms inside attention and MLP
    "eva02_base_patch14_224",
    "eva02_base_patch16_clip_224",
    "vit_base_patch16_dinov3",
    "vit_pe_core_base_patch16_224",
    "vit_base_patch16_rope_mixed_224",  # a rotary table for each block and head
    "vit_medium_patch16_rope_reg1_gap_256",
    "vit_giant_patch16_lingbot",
    "beit_base_patch16_224",
    "vit_relpos_base_patch16_224",
    "vit_relpos_base_patch16_clsgap_224",
    "vit_srelpos_small_patch16_224",  # a bias that all blocks share
    "naflexvit_base_patch16_gap",
    "qwen3_vit_88m",
    "deepseek_vit_412m",
]
NAMES = [name for name in NAMES if name in timm.list_models()]  # older timm lacks some

OVERRIDES: dict[str, dict[str, Any]] = {
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "LayerScale": {"init_values": 1e-5},
    "no LayerScale in one half": {"init_values": 1e-5, "proj_bias": False},
    "no bias of queries, keys and values": {"qkv_bias": False},
    "no bias of products": {"proj_bias": False},
    "norms of queries and keys": {"qk_norm": True},
    "norms inside": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "ReLU": {"act_layer": nn.ReLU},
    "GELU by tanh": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "SwiGLU": {"mlp_layer": SwiGLUPacked},
    "no norm at the end": {"final_norm": False},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "one block": {"depth": 1},
}


@cache
def small(name: str) -> tuple[nn.Module, int]:
    return coverage.build(name)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def equal(model: nn.Module, images: Tensor) -> None:
    """The fused loop gives what the plain one gives, at r = 0, in the middle, at the end and by lists."""
    plain, fused = tome_core.wrap(model, "plain"), tome_core.wrap(model, "fused")
    assert fused.implementation(images).name == "fused" and plain.implementation(images).name == "plain"
    for r in (0, 3, 99, [(0, 9)[i % 2] for i in range(fused.num_blocks)]):
        close(fused(images, r), plain(images, r))
        wanted, got = plain.forward_tokens(images, r), fused.forward_tokens(images, r)
        close(got.x, wanted.x)
        assert (got.size is None) == (wanted.size is None)
        if got.size is not None and wanted.size is not None:
            assert torch.equal(got.size, wanted.size)


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_plain_model(name: str) -> None:
    model, side = small(name)
    equal(model, torch.randn(2, 3, side, side))


@torch.inference_mode()
@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES)
def test_equals_the_plain_model_of_any_make(build: Build, overrides: dict[str, Any]) -> None:
    equal(build(**overrides), torch.randn(2, 3, 96, 96))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "eva02_base_patch14_224", "beit_base_patch16_224"])
def test_patches_by_the_models_own_convolution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows lie in another order than the kernels take."""
    model, side = small(name)
    merged = tome_core.wrap(model)
    monkeypatch.setattr(type(merged.family), "projection", lambda *_: None)
    images = torch.randn(2, 3, side, side)
    assert not merged.family.embed(model, images).x.is_contiguous() or name.startswith(("eva", "beit"))
    equal(model, images)


@torch.inference_mode()
def test_tokens_in_another_order_do_not_pass_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks before the kernels see, without a GPU, what only a GPU would get wrong."""
    model, side = small("vit_base_patch16_siglip_224")

    def embed(family: Any, model: Any, images: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        x, positions, _ = family.embed(model, images)
        return x, kernels.norm(x.contiguous(), None, parts_of(family.blocks(model)[0]).norm1), positions

    monkeypatch.setattr(vit, "embed", embed)
    for r in (0, 3):
        with pytest.raises((ValueError, RuntimeError), match="x is not contiguous|view size is not compatible"):
            tome_core.wrap(model, "fused")(torch.randn(2, 3, side, side), r)
    with pytest.raises(ValueError, match="x is not contiguous"):
        tome_core.wrap(model, "fused")(torch.randn(1, 3, side, side), 3)


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one(name: str) -> None:
    model, side = small(name)
    images = torch.randn(2, 3, side, side)
    fused = tome_core.wrap(model, "fused")
    close(fused(images[:1], 3), fused(images, 3)[:1])


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", (64, 128)),
        ("eva02_tiny_patch14_224", (56, 112)),
        ("vit_small_patch16_dinov3", (64, 128)),
        ("vit_small_patch16_rope_mixed_224", (64, 128)),
        ("naflexvit_base_patch16_gap", (64, 128)),
    ],
)
def test_images_of_other_sizes(build: Build, name: str, size: tuple[int, int]) -> None:
    overrides = {} if name.startswith("naflex") else {"dynamic_img_size": True}
    model = build(name, img_size=84 if "patch14" in name else 96, **overrides)
    equal(model, torch.randn(2, 3, *size))


@torch.inference_mode()
def test_images_that_patches_do_not_divide(build: Build) -> None:
    equal(build(dynamic_img_size=True, dynamic_img_pad=True), torch.randn(2, 3, 70, 100))
    with pytest.raises(AssertionError, match="Input height"):
        tome_core.wrap(build(), "fused")(torch.randn(2, 3, 64, 64))


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_neither_the_images_nor_the_model_are_written_to(name: str) -> None:
    model, side = small(name)
    images = torch.randn(1, 3, side, side)
    before = images.clone(), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fused = tome_core.wrap(model, "fused")
    first = fused(images, 3)
    assert torch.equal(fused(images, 3), first)
    assert torch.equal(images, before[0])
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[1][key]), key


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "vit_small_patch16_rope_mixed_224"])
def test_weights_may_change_between_calls(build: Build, name: str) -> None:
    model, images = build(name), torch.randn(2, 3, 96, 96)
    fused = tome_core.wrap(model, "fused")
    before = fused(images, 3)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    after = fused(images, 3)
    assert not torch.allclose(after, before)
    close(after, tome_core.wrap(model, "plain")(images, 3))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(build: Build, dtype: torch.dtype) -> None:
    model, images = build(), torch.randn(4, 3, 96, 96)
    wanted = tome_core.wrap(model)(images)
    half = tome_core.wrap(build().to(dtype), "fused")
    got = half(images.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - wanted).norm() < 0.03 * wanted.norm()
    assert half(images.to(dtype), 5).isfinite().all()


def reason(merged: MergedViT, images: Tensor) -> str:
    implementation = merged.implementation(images)
    assert implementation.name == "plain"
    return implementation.reason


def test_says_why_it_is_plain(build: Build) -> None:
    images = torch.randn(1, 3, 96, 96)
    model = build()
    merged = tome_core.wrap(model, "fused")
    assert "gradients" in reason(merged, images)
    with torch.no_grad():
        assert merged.implementation(images) == ("fused", "nothing is against it")
        assert "no kernels for cpu" in reason(tome_core.wrap(build()), images)
        assert reason(tome_core.wrap(build(), "plain"), images) == reason(merged.plain(), images) == "asked for"
        with torch.autocast("cpu"):
            assert "autocast" in reason(merged, images)
        model.blocks[1].train()
        assert "training" in reason(merged, images)
        merged.eval().double()
        assert "the model is torch.float64" in reason(merged, images.double())
        merged.float()
        assert "the images are torch.float16" in reason(merged, images.half())
        assert "the images are torch.uint8" in reason(merged, images.byte())
        handle = model.blocks[1].attn.proj.register_forward_hook(lambda *_: None)
        assert "hooks" in reason(merged, images)
        handle.remove()
        assert merged.implementation(images).name == "fused"


UNFUSABLE: list[tuple[str, dict[str, Any], str]] = [
    ("vit_tiny_patch16_224", {"block_fn": ParallelThingsBlock}, "block 0 is a ParallelThingsBlock"),
    ("vit_tiny_patch16_224", {"block_fn": ParallelScalingBlock}, "block 0 is a ParallelScalingBlock"),
    ("vit_tiny_patch16_224", {"block_fn": DiffParallelScalingBlock}, "block 0 is a DiffParallelScalingBlock"),
    ("vit_tiny_patch16_224", {"block_fn": ResPostBlock}, "block 0 is a ResPostBlock"),
    ("vit_relpos_medium_patch16_rpn_224", {}, "block 0 is a ResPostRelPosBlock"),
    ("eva02_tiny_patch14_224", {"img_size": 84, "use_post_norm": True}, "block 0 is a EvaBlockPostNorm"),
    ("vit_tiny_patch16_224", {"attn_layer": "diff"}, "block 0 has a DiffAttention"),
    ("vit_base_patch16_sapiens2", {"num_kv_heads": 1}, "block 0 has 1 heads of keys for 3 of queries"),
    ("vit_tiny_patch16_224", {"num_heads": 4}, "heads of 12 channels; fused: multiples of 8 from 16 to 128"),
    ("vit_tiny_patch16_224", {"embed_dim": 136, "num_heads": 1}, "heads of 136 channels"),
    ("vit_tiny_patch16_224", {"norm_layer": partial(nn.LayerNorm, elementwise_affine=False)}, "has a LayerNorm, not"),
    ("vit_tiny_patch16_224", {"norm_layer": nn.Identity}, "has a Identity, not LayerNorm or RMSNorm with weights"),
]


@pytest.mark.parametrize(("name", "overrides", "found"), UNFUSABLE, ids=[case[2] for case in UNFUSABLE])
def test_what_cannot_run_fused_says_so(build: Build, name: str, overrides: dict[str, Any], found: str) -> None:
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    model = build(name, **overrides)
    with pytest.raises(tome_core.UnsupportedModelError, match=found):
        tome_core.wrap(model, "fused")
    merged = tome_core.wrap(model)
    with torch.inference_mode():
        images = torch.randn(1, 3, 96, 96) if "patch14" not in name else torch.randn(1, 3, 84, 84)
        assert found in merged.implementation(images).reason
        assert merged(images, 3).isfinite().all()


def test_a_layer_that_was_replaced_is_not_run_as_what_it_was(build: Build) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = build()
    model.blocks[1].attn.proj = Doubled(48, 48)
    with pytest.raises(tome_core.UnsupportedModelError, match="block 1 projects the output of attention by a Doubled"):
        tome_core.wrap(model, "fused")
    model = build()
    model.blocks[1].mlp.fc2 = Doubled(192, 48).eval()
    with torch.inference_mode():
        equal(model, torch.randn(2, 3, 96, 96))
