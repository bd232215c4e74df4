"""Every family that `wrap` accepts: a token of size s acts as s copies of it do in timm's own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from benchmarks.coverage import neutralise
from tests.core.variants import Case
from tome_core import wrap
from tome_core.positions import Position
from tome_core.schedule import token_counts

Build = Callable[..., Any]


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
    assert torch.equal(merged.forward_tokens(images).x, features.flatten(1, -2))
    torch.testing.assert_close(merged(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", [1, 5, 1000])
def test_tokens_merge_as_counted_and_logits_stay_finite(case: Case, r: int) -> None:
    model, merged, images = case
    tokens = merged.forward_tokens(images, r, track=True)
    assert tokens.size is not None and tokens.source is not None
    num_tokens = tokens.source.shape[1]
    prefix = merged.num_prefix_tokens
    assert tokens.x.shape[1] == token_counts((r,) * 3, num_tokens, prefix)[-1] < num_tokens
    if not isinstance(model, timm.models.NaFlexVit):  # which counts at the size it was trained at
        assert num_tokens == merged.num_tokens
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
    tokens = case.merged.forward_tokens(case.images, r)
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
    counts = [merged.forward_tokens(images, r).x.shape[1] - prefix for r in (0, 4, 1000)]
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
