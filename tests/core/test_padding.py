"""Images of several sizes in one batch, as a NaFlexVit's dictionary: each is answered as it would be alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tome_core import MergedViT, match, merge, wrap
from tome_core.padding import match_padded
from tome_core.schedule import max_r
from tome_core.tokens import PADDING

Build = Callable[..., Any]

GRIDS = [(6, 6), (4, 5), (3, 9), (1, 3)]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("naflexvit_base_patch16_gap", {}),
    "attention pool": ("naflexvit_base_patch16_map", {}),
    "largest": ("naflexvit_base_patch16_gap", {"global_pool": "max"}),
    "class token": ("naflexvit_base_patch16_gap", {"class_token": True, "global_pool": "token"}),
    "no prefix": ("naflexvit_base_patch16_gap", {"reg_tokens": 0}),
    "factorized positions": ("naflexvit_base_patch16_parfac_gap", {}),
    "rotary": ("naflexvit_base_patch16_gap", {"rope_type": "axial", "reg_tokens": 0}),
    "one rotary table a head": ("naflexvit_base_patch16_gap", {"rope_type": "mixed"}),
}


@pytest.fixture(params=KINDS)
def merged(request: pytest.FixtureRequest, build: Build) -> MergedViT:
    name, options = KINDS[request.param]
    return wrap(build(name, **options))


def batch(*grids: tuple[int, int]) -> dict[str, Tensor]:
    """Random images of some grids of patches. Padding holds numbers that would show if anything read them."""
    N = max(rows * columns for rows, columns in grids)
    made = {
        "patches": torch.full((len(grids), N, 16 * 16 * 3), 50.0),
        "patch_coord": torch.zeros(len(grids), N, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(grids), N, dtype=torch.bool),
    }
    for i, (rows, columns) in enumerate(grids):
        n, place = rows * columns, torch.arange(rows * columns)
        made["patches"][i, :n] = torch.randn(n, 16 * 16 * 3, generator=torch.Generator().manual_seed(n))
        made["patch_coord"][i, :n] = torch.stack([place // columns, place % columns], dim=1)
        made["patch_valid"][i, :n] = True
    return made


def test_r_0_is_timm(merged: MergedViT) -> None:
    images, valid = batch(*GRIDS), batch(*GRIDS)["patch_valid"]
    model: Any = merged.model
    torch.testing.assert_close(merged(images), model(images), rtol=1e-4, atol=1e-5)
    theirs, ours = model.forward_features(**images), merged.forward_features(images)
    P = merged.num_prefix_tokens
    assert ours.keys() == theirs.keys() and torch.equal(ours["patch_valid"], valid)
    torch.testing.assert_close(ours["patches"][:, P:][valid], theirs["patches"][:, P:][valid], rtol=1e-4, atol=1e-5)
    options: dict[str, Any] = {"output_fmt": "NLC", "output_dict": True, "return_prefix_tokens": True, "norm": True}
    dense, wanted = (each.forward_intermediates(images, [0, -1], **options) for each in (merged, model))
    assert dense.keys() == wanted.keys() and torch.equal(dense["patch_valid"], valid)
    for one, other in zip(dense["image_intermediates"], wanted["image_intermediates"], strict=True):
        torch.testing.assert_close(one[valid], other[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("r", [1, 4, [5, 0, 7], 1000])
def test_an_image_gets_the_same_logits_beside_larger_ones(merged: MergedViT, r: Any) -> None:
    together = merged(batch(*GRIDS), r)
    alone = torch.cat([merged(batch(grid), r) for grid in GRIDS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together - merged(batch(*GRIDS))).abs().max() > 1e-3


def test_the_books_are_kept_in_every_image(merged: MergedViT) -> None:
    images, P = batch(*GRIDS), merged.num_prefix_tokens
    tokens = merged.forward_tokens(images, 5, track=True)
    assert tokens.size is not None and tokens.source is not None
    patches = images["patch_valid"].sum(dim=1)
    left = tokens.size >= 1
    assert (tokens.size * left).sum(dim=1).tolist() == (P + patches).tolist()
    for i, n in enumerate(patches.tolist()):
        alone = merged.forward_tokens(batch(GRIDS[i]), 5, track=True)
        kept = left[i].nonzero().flatten()
        assert kept.tolist() == list(range(len(kept))) and alone.source is not None
        assert len(kept) == (alone.size >= 1).sum() if alone.size is not None else P + n
        torch.testing.assert_close(tokens.x[i, kept], alone.x[0, : len(kept)], rtol=1e-4, atol=1e-5)
        assert torch.equal(tokens.source[i, : P + n], alone.source[0, : P + n])


def test_a_dictionary_of_one_size_is_the_images_of_that_size(build: Build) -> None:
    merged = wrap(build("naflexvit_base_patch16_gap"))
    images = batch((4, 6))
    pixels = images["patches"].view(1, 4, 6, 16, 16, 3).permute(0, 5, 1, 3, 2, 4).reshape(1, 3, 64, 96)
    for r in (0, 4, 1000):
        torch.testing.assert_close(merged(images, r), merged(pixels, r), rtol=1e-4, atol=1e-5)


def test_it_can_be_trained(build: Build) -> None:
    merged = wrap(build("naflexvit_base_patch16_gap", patch_drop_rate=0.25).train())
    merged(batch(*GRIDS[:3]), 3).square().sum().backward()
    gradients = [parameter.grad for parameter in merged.parameters() if parameter.grad is not None]
    assert len(gradients) > 30 and all(gradient.isfinite().all() for gradient in gradients)


@given(st.integers(0, 3), st.lists(st.integers(0, 12), min_size=1, max_size=3), st.integers(1, 6), st.integers(0, 99))
def test_each_image_merges_what_it_would_alone(P: int, patches: list[int], r: int, seed: int) -> None:
    N = P + max(patches)
    r = min(r, max_r(N, P))
    assume(r > 0)
    metric = torch.randn(len(patches), N, 4, generator=torch.Generator().manual_seed(seed))
    size = torch.full((len(patches), N), PADDING)
    for i, n in enumerate(patches):
        size[i, : P + n] = 1
    plan = match_padded(metric, size, r, P)
    assert plan.keep.shape == (len(patches), N - r) and plan.src.shape == plan.dst.shape == (len(patches), r)
    x = torch.randn(len(patches), N, 2)
    merged_x, merged_size = merge(plan, x, size)
    assert merged_x.isfinite().all()
    for i, n in enumerate(patches):
        alone = match(metric[i : i + 1, : P + n], r, P)
        left = alone.keep.shape[1]
        assert torch.equal(plan.keep[i, :left], alone.keep[0])
        assert torch.equal(torch.cat([plan.keep[i], plan.src[i]]).sort().values, torch.arange(N))
        expected_x, expected_size = merge(alone, x[i : i + 1, : P + n])
        torch.testing.assert_close(merged_x[i, :left], expected_x[0])
        torch.testing.assert_close(merged_size[i, :left], expected_size[0])
        assert (merged_size[i, left:] < 1).all()


def test_what_merging_cannot_do_with_a_dictionary_is_refused(build: Build) -> None:
    merged, images = wrap(build("naflexvit_base_patch16_gap")), batch((2, 3))
    with pytest.raises(ValueError, match="this is a VisionTransformer"):
        wrap(build())(images)
    with pytest.raises(ValueError, match="this is a model made by from_pixels"):
        merged.from_pixels((0.5,) * 3, (0.5,) * 3)(images)
    with pytest.raises(ValueError, match="lacks patch_coord, patch_valid"):
        merged({"patches": images["patches"]})
    with pytest.raises(ValueError, match="has an attn_mask, which merged tokens cannot follow"):
        merged(images | {"attn_mask": torch.zeros(1)})
    with pytest.raises(ValueError, match="output_fmt is 'NCHW', but each image of a dictionary has its own grid"):
        merged.forward_intermediates(images)
    assert merged.implementation(images) == ("plain", "the images are a dictionary of patches")
