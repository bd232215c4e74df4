"""Every family that `wrap` accepts: a token of size s acts as s copies of it do in timm's own code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from benchmarks.coverage import neutralise
from tome_core import MergedViT, wrap
from tome_core.positions import Position

Build = Callable[..., Any]

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
    "two attentions": ("vit_small_patch16_18x2_224", {}),
    "norm after attention": ("vit_base_patch16_rpn_224", {}),
    "attention and MLP in parallel": ("vit_base_patch16_xp_224", {}),
    "parallel, no qkv bias": ("vit_pwee_patch16_reg1_gap_256", {"qkv_bias": False}),
    "differential attention": ("vit_dwee_patch16_reg1_gap_256", {"num_heads": 2}),
    "differential attention in parallel": ("vit_dpwee_patch16_reg1_gap_256", {"num_heads": 2}),
    "EVA": ("eva_giant_patch14_224", {"img_size": 84}),
    "EVA-02: rotary, SwiGLU": ("eva02_base_patch14_448", {"img_size": 84}),
    "EVA, norm after attention": ("eva02_enormous_patch14_clip_224", {"img_size": 84}),
    "rotary, one table a head": ("vit_small_patch16_rope_mixed_224", {}),
    "rotary, class token pooled": ("vit_small_patch16_rope_ape_224", {"global_pool": "token"}),
    "rotary, map pool": ("vit_pe_core_base_patch16_224", {}),
    "DINOv3": ("vit_small_patch16_dinov3", {}),
    "DINOv3, qkv bias": ("vit_small_patch16_dinov3_qkvb", {}),
    "separate q, k and v": ("eva02_small_patch14_224", {"img_size": 84, "qkv_fused": False}),
    "grouped queries": ("vit_base_patch16_sapiens2", {"num_heads": 4, "num_kv_heads": 2}),
    "NaFlex": ("naflexvit_base_patch16_gap", {}),
    "NaFlex, map pool": ("naflexvit_base_patch16_map", {}),
    "NaFlex, rotary": ("naflexvit_base_patch16_gap", {"rope_type": "axial"}),
    "NaFlex, one rotary table a head": ("naflexvit_base_patch16_gap", {"rope_type": "mixed"}),
    "relative positions": ("vit_relpos_small_patch16_224", {}),
    "relative positions, shared": ("vit_srelpos_small_patch16_224", {}),
    "relative positions, class token": ("vit_relpos_base_patch16_clsgap_224", {}),
    "relative positions, class token pooled": ("vit_relpos_base_patch16_cls_224", {}),
    "relative positions, norm after attention": ("vit_relpos_medium_patch16_rpn_224", {}),
    "BEiT": ("beit_base_patch16_224", {}),
    "BEiT, bias shared too": ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True}),
    "BEiT, SwiGLU": ("beitv2_base_patch16_224", {"swiglu_mlp": True, "global_pool": "token"}),
    "Qwen": ("qwen3_vit_88m", {}),
    "DeepSeek": ("deepseek_vit_412m", {"img_size": 84}),
}


class Case(NamedTuple):
    """A small model of one variant, wrapped, and two images for it."""

    model: Any
    merged: MergedViT
    images: Tensor


@pytest.fixture(params=VARIANTS)
def case(request: pytest.FixtureRequest, build: Build) -> Case:
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


def sizes(case: Case) -> Tensor:
    """Sizes of one image's tokens as if some had merged, (1, N); prefix tokens have size 1."""
    size = torch.randint(1, 6, (1, case.merged.family.embed(case.model, case.images).x.shape[1])).float()
    size[:, : case.merged.num_prefix_tokens] = 1
    return size


def copies(x: Tensor, size: Tensor, dim: int = 1) -> Tensor:
    """The tokens of one image along `dim`, each as often as its size says."""
    return x.repeat_interleave(size[0].long(), dim=dim)


def of_timm(block: Any, x: Tensor, position: Position) -> Tensor:
    """timm's own block at given positions."""
    y: Tensor
    if position.bias is not None:
        attn = block.attn
        if hasattr(attn, "relative_position_bias_table"):
            table, attn.relative_position_bias_table = attn.relative_position_bias_table, None
            y = block(x, shared_rel_pos_bias=position.bias)
            attn.relative_position_bias_table = table
        else:
            own, attn.rel_pos = attn.rel_pos, None
            y = block(x, shared_rel_pos=position.bias)
            attn.rel_pos = own
    elif position.rope is not None:
        y = block(x, rope=position.rope)
    else:
        y = block(x)
    return y


def test_r_0_is_timm(case: Case) -> None:
    model, merged, images = case
    features = model.forward_features(images)
    assert torch.equal(merged.forward_features(images).x, features.flatten(1, -2))
    torch.testing.assert_close(merged(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", [1, 5, 1000])
def test_tokens_merge_as_counted_and_logits_stay_finite(case: Case, r: int) -> None:
    model, merged, images = case
    tokens = merged.forward_features(images, r, track=True)
    assert tokens.size is not None and tokens.source is not None
    num_tokens = tokens.source.shape[1]
    prefix = merged.num_prefix_tokens
    if not isinstance(model, timm.models.NaFlexVit):  # which counts at the size it was trained at
        assert num_tokens == merged.num_tokens
        assert tokens.x.shape[1] == merged.token_counts(r)[-1]
    assert tokens.x.shape[1] == max(num_tokens - 3 * r, tokens.x.shape[1] if r > 5 else 0) < num_tokens
    assert tokens.size.sum(1).tolist() == [num_tokens] * 2
    assert tokens.source[:, :prefix].tolist() == [list(range(prefix))] * 2
    logits = merged(images, r)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


def test_a_block_treats_a_size_as_that_many_copies(case: Case) -> None:
    model, merged, images = case
    i, size = 1, sizes(case)
    positions = merged.family.embed(model, images[:1]).positions
    x, position = torch.randn(*size.shape, 48), merged.family.position(model, positions, i)
    patch_size = size[:, merged.num_prefix_tokens :]
    copied = Position(
        rope=None if position.rope is None else copies(position.rope, patch_size, dim=-2),
        bias=None if position.bias is None else copies(copies(position.bias, size, dim=-1), size, dim=-2),
    )
    block = merged.family.blocks(model)[i]
    first_copy = (size.cumsum(dim=1) - size).long()[0]
    expected = of_timm(block, copies(x, size), copied)[:, first_copy]
    halves = merged.family.halves(block)
    attended, _ = halves.attend(block, x, size, position, None)
    torch.testing.assert_close(halves.feed_forward(block, attended), expected, rtol=1e-4, atol=1e-5)


def test_the_head_treats_a_size_as_that_many_copies(case: Case) -> None:
    size = sizes(case)
    x = torch.randn(*size.shape, 48)
    for pre_logits in (False, True):
        expected = case.model.forward_head(copies(x, size), pre_logits=pre_logits)
        given = case.merged.family.head(case.model, x, size, pre_logits)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("r", [0, 5])
def test_computing_only_the_prefix_in_the_last_block_gives_the_same_logits(case: Case, r: int) -> None:
    tokens = case.merged.forward_features(case.images, r)
    torch.testing.assert_close(case.merged(case.images, r), case.merged.forward_head(tokens), rtol=1e-5, atol=1e-5)


def test_the_keys_are_those_of_every_head_before_they_rotate(case: Case) -> None:
    block: Any = case.merged.family.blocks(case.model)[1]
    norms = [module.k_norm for module in block.modules() if hasattr(module, "k_norm")]
    if len(norms) != 1 or "Scaling" in type(block).__name__:
        pytest.skip("keys cannot be seen from outside")
    seen: list[Tensor] = []
    x = case.merged.family.embed(case.model, case.images)
    position = case.merged.family.position(case.model, x.positions, 1)
    with norms[0].register_forward_hook(lambda module, inputs, output: seen.append(output)):
        of_timm(block, x.x, position)
        _, keys = case.merged.family.halves(block).attend(block, x.x, None, position, None)
    assert torch.equal(keys, seen[0])


def test_merging_identical_patches_changes_nothing(case: Case) -> None:
    with torch.no_grad():
        neutralise(case.merged)
    image = case.images[:, :, :1, :1].expand_as(case.images)
    for r in (4, 7, 1000):
        torch.testing.assert_close(case.merged(image, r), case.model(image), rtol=0, atol=1e-4)


@pytest.mark.parametrize("pool", ["avg", "avgmax"])
def test_autocast_does_not_lower_the_weighted_mean(build: Build, pool: str) -> None:
    model = build("vit_medium_patch16_gap_240", global_pool=pool, num_classes=0)
    case = Case(model, wrap(model), torch.randn(1, 3, 96, 96))
    size = sizes(case)
    x = torch.randn(*size.shape, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = case.merged.family.head(model, x, size)
    assert torch.equal(lowered, case.merged.family.head(model, x, size))


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_base_patch16_rpn_224",
        "vit_small_patch16_18x2_224",
        "vit_base_patch16_xp_224",
        "vit_dpwee_patch16_reg1_gap_256",
        "vit_dwee_patch16_reg1_gap_256",
        "eva_giant_patch14_224",
        "vit_relpos_small_patch16_224",
        "beit_base_patch16_224",
    ],
)
def test_training_drops_what_timm_drops(build: Build, name: str) -> None:
    rates = {"drop_path_rate": 0.3, "proj_drop_rate": 0.3, "attn_drop_rate": 0.3}
    model = build(name, num_heads=2, **rates, img_size=84 if "14" in name else 96).train()
    merged, block = wrap(model), model.blocks[-1]
    x = torch.randn(4, merged.num_tokens, 48)
    halves = merged.family.halves(block)
    torch.manual_seed(1)
    expected = block(x)
    torch.manual_seed(1)
    position = merged.family.position(model, None, 2)  # computed by a network that drops too
    attended, _ = halves.attend(block, x, None, position, None)
    torch.testing.assert_close(halves.feed_forward(block, attended), expected)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_a_model_of_any_image_size_merges_at_any(build: Build, name: str) -> None:
    model = build(name, dynamic_img_size=True)
    merged, images = wrap(model), torch.randn(2, 3, 96, 160)  # 60 patches, where the model's own size has 36
    torch.testing.assert_close(merged(images), model(images), rtol=1e-5, atol=1e-5)
    prefix = merged.num_prefix_tokens
    counts = [merged.forward_features(images, r).x.shape[1] - prefix for r in (0, 4, 1000)]
    assert counts == [60, 48, 8]


def test_a_projection_wrapped_by_another_module_runs_whole(build: Build) -> None:
    """An adapter around `qkv`, such as LoRA's, has no weight that could be cut into parts."""

    class Adapter(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear, self.out_features = linear, linear.out_features

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = 2 * self.linear(x)
            return y

    model = build()
    for block in model.blocks:
        block.attn.qkv = Adapter(block.attn.qkv)
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(wrap(model)(images), model(images), rtol=1e-5, atol=1e-5)
